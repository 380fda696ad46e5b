"""Whole runs through the real launcher: killed, stopped, resumed, refused; and what they leave for others."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from curation.errors import UserError
from curation.hashing import hash64
from jobs.launch import PATIENCE
from tests.conftest import ROOT, gemsmith
from tests.training.conftest import TINY, tiny_config, write_shards
from training import checkpoint
from training.config import LoaderConfig
from training.data import ImageSpec, Loader, Shards
from training.inference import load
from training.train import check_free

STEPS = 24
AUTO = ("--loader.retain", "auto", "--loader.retain_gib", "0.0045")


def arguments(shards: Path, run: Path, *more: str) -> list[str]:
    recipe = ["--config", "recipes/train/tiny_mmgem.yaml", *TINY, "--samples", str(STEPS * 32), "--log_every", "1"]
    recipe += AUTO
    return [*recipe, "--checkpoint_every", "4", "--data", str(shards), "--out", str(run), *more]


def start(shards: Path, run: Path, *more: str) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name("gemsmith")), "train", *arguments(shards, run, *more), "--ranks", "2"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def family_of(pid: int) -> list[psutil.Process]:
    me = psutil.Process(pid)
    return [me, *me.children(recursive=True)]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the files of all ranks of the last checkpoint: weights, both moments."""
    folder = checkpoint.latest(run)
    assert folder is not None
    return {f"{f.name}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def seen_of(run: Path) -> list[tuple[str, float]]:
    """What samples each step saw, and its loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["batch_id"], line["loss"]) for line in lines]


def cut_short(run: Path, copy: Path) -> Path:
    """A copy of a finished run, as a kill after its last checkpoint but one leaves it."""
    shutil.copytree(run, copy)
    last = checkpoint.latest(copy)
    assert last is not None
    for folder in (copy / "export", last):
        shutil.rmtree(folder)
    (copy / "manifest.json").unlink()
    return copy


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    gemsmith("train", *arguments(shards, run), "--ranks", 2)
    return run


def test_a_run_leaves_what_the_contract_says(finished, shards):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] == pytest.approx(line["loss_embed"] + line["loss_generate"], rel=1e-5) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    config, spec = tiny_config(), ImageSpec(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    loader = Loader(Shards(shards), config.loader, spec, lambda _: {}, seed=config.seed, rank=0, world_size=1)
    for step, epoch in ((0, 0), (2, 0), (4, 1)):  # keys of these shards are numbers, uids the same in hexadecimal
        draws = [hash64(config.seed, epoch, f"{int(key):032x}") >> 1 for key in loader.ids(step)]
        assert lines[step]["batch_id"] == f"{sum(draws) % 2**64:016x}" and len({*draws}) == 32
    assert {"temperature", "grad_norm", "lr", "samples_per_second", "data_share", "samples"} <= set(lines[0])
    assert [p.name for p in checkpoint.complete(finished)] == ["step_00000016", "step_00000020", "step_00000024"]
    assert {"mfu", "hfu", "memory_mib", "all_gather_mib", "reduce_scatter_mib", "lr_0", "errors_by_reason"} <= set(
        lines[0]
    )
    assert all(0 < line["mfu"] < line["hfu"] < 1 for line in lines)
    for line in lines:  # all ranks' operations of a step
        assert line["executed_gflop"] / line["useful_gflop"] == pytest.approx(line["hfu"] / line["mfu"])
        assert line["useful_gflop"] > 0
    assert len(list((finished / "logs").glob("rank_*.log"))) == 2
    assert list((finished / "tensorboard").glob("events*"))
    done = gemsmith("train", *arguments(shards, finished), "--ranks", 2)
    assert "already complete" in done.stdout


def test_export_and_sharded_checkpoint_are_the_same_model(finished, tmp_path):
    from PIL import Image

    taken_away = shutil.copytree(finished / "export", tmp_path / "elsewhere")
    pictures = [Image.new("RGB", (50, 40), c) for c in ("red", "green", "navy")]
    models = [load(taken_away), load(finished / "checkpoints" / f"step_{STEPS:08d}")]
    pixels = models[0].images(pictures)
    assert torch.equal(pixels, models[1].images(pictures))
    images = [m.embed_images(pixels) for m in models]
    texts = [m.embed_texts(["a thing", "another thing of colour 3"]) for m in models]
    assert torch.equal(*images) and torch.equal(*texts)
    assert torch.allclose(images[0].norm(dim=1), torch.ones(3), atol=1e-5)
    assert models[0].caption(pixels) == models[1].caption(pixels)
    # A text's embedding does not depend on what it is padded beside.
    alone = models[0].embed_texts(["a thing"])
    torch.testing.assert_close(alone[0], texts[0][0], atol=1e-5, rtol=0)


def test_sigkill_and_resume_give_the_same_bits(finished, shards, tmp_path):
    run = tmp_path / "killed"
    process = start(shards, run)
    wait_for(lambda: len(checkpoint.complete(run)) >= 2 or process.poll() is not None)
    for victim in family_of(process.pid):
        victim.kill()
    process.wait()
    assert not (run / "manifest.json").exists()
    done = gemsmith("train", *arguments(shards, run), "--ranks", 2)
    assert "resuming after step" in done.stdout and "loader.retain: " not in done.stdout, "what was chosen is kept"
    chosen = [checkpoint.check(checkpoint.step_folder(r, STEPS))["retain"] for r in (finished, run)]
    assert chosen[0] == chosen[1] and 8 < chosen[0] < 16, "between a chunk and all of a rank's samples"
    expected, found = state_of(finished), state_of(run)
    assert expected.keys() == found.keys() and len(expected) > 4
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (steps := seen_of(run)) == seen_of(finished) and len({batch for batch, _ in steps}) == STEPS


def test_sigterm_while_the_ranks_start_ends_the_run(shards, tmp_path):
    run = tmp_path / "early"
    process = start(shards, run)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode in (143, -signal.SIGTERM)
    assert not (run / "manifest.json").exists()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("killed", ["gemsmith", "runner"])
def test_a_run_that_is_ended_saves_together_and_leaves_no_orphans(shards, tmp_path, killed):
    """By SIGTERM to `gemsmith train`, or as the launcher's runner dies; of a run too long to end meanwhile."""
    run, steps = tmp_path / "stopped", 100_000
    process = start(shards, run, "--samples", str(steps * 32))
    wait_for(lambda: len(checkpoint.complete(run)) >= 1 or process.poll() is not None)
    ranks = [int(f.read_text()) for f in (run / "ranks").glob("*.pid")]
    with pytest.raises(UserError, match=rf"{ranks[0]}.* train there"):  # a second set of ranks beside the first
        check_free(run)
    if killed == "gemsmith":
        os.kill(process.pid, signal.SIGTERM)
    else:
        (runner,) = psutil.Process(process.pid).children()
        runner.kill()
    output, _ = process.communicate(timeout=PATIENCE)  # later they would be killed
    assert process.returncode == {"gemsmith": 143, "runner": 128 + signal.SIGKILL}[killed], output[-2000:]
    assert len(ranks) == 2 and all(gone(pid) for pid in ranks)
    check_free(run)
    last = checkpoint.latest(run)
    assert last is not None
    stopped_at = json.loads((last / "manifest.json").read_text())["step"]
    assert stopped_at < steps
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == stopped_at  # no step was done and lost


def test_other_work_is_refused_and_nothing_written_over(finished, shards, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    refused = gemsmith("train", *arguments(shards, finished, "--optim.lr", "1e-4"), "--ranks", 2, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "--overwrite" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_checkpoint_cut_short_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    folder = checkpoint.latest(copy)
    assert folder is not None
    file = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=file.name):
        load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="cut short"):
        load(folder)


def test_broken_samples_past_the_budget_stop_the_run(tmp_path):
    data = write_shards(tmp_path / "data", [64])
    tarred = data / "00000000.tar"
    from curation import tar

    content = bytearray(tarred.read_bytes())
    for sample in tar.samples(bytes(content))[0][:20]:
        jpg = sample.members["jpg"]
        content[jpg.offset : jpg.offset + jpg.size] = bytes(jpg.size)
    tarred.write_bytes(content)
    done = gemsmith("train", *arguments(data, tmp_path / "run"), "--ranks", 2, check=False)
    assert done.returncode == 2 and "max_error_rate" in done.stderr


def test_steps_that_are_no_numbers_are_left_out_and_end_the_run(shards, tmp_path):
    run = tmp_path / "run"
    wild = ("--optim.lr", "1e30", "--optim.warmup_steps", "1", "--optim.max_skipped", "3", "--deepspeed")
    for stage in ("zero0", "zero3"):
        out = run / stage
        done = gemsmith("train", *arguments(shards, out, *wild, f"ds_configs/{stage}.json"), "--ranks", 1, check=False)
        assert done.returncode == 2 and "4 steps in a row could not be taken" in done.stderr, done.stderr[-2000:]
        assert "is left out: the loss is nan" in done.stdout
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [m["skipped_steps"] for m in lines][-4:] == [0, 1, 2, 3]


def test_without_zero_a_run_trains_and_is_clipped(shards, tmp_path):
    run = tmp_path / "plain"
    gemsmith("train", *arguments(shards, run, "--deepspeed", "ds_configs/zero0.json"), "--ranks", 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["skipped_steps"] for m in lines] == [0] * STEPS
    assert lines[0]["grad_norm"] > 1.0 and lines[-1]["loss"] < lines[0]["loss"]


def test_a_loss_that_explodes_is_left_out_and_ends_the_run(shards, tmp_path):
    """The rate climbs until the weights fly apart; every loss is a number."""
    run = tmp_path / "run"
    wild = ["--optim.lr", "100", "--optim.warmup_steps", "10000", "--optim.groups", "[]"]
    wild += ["--optim.max_loss_ratio", "1.5", "--optim.max_skipped", "2"]
    more = ("--samples", str(300 * 32), "--checkpoint_every", "1", "--deepspeed", "ds_configs/zero0.json")
    done = gemsmith("train", *arguments(shards, run, *wild, *more), "--ranks", 1, check=False)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "3 steps in a row could not be taken" in error, done.stderr[-2000:]
    assert "above optim.max_loss_ratio 1.5 x the median" in error
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) > 10 and all(math.isfinite(line["loss"]) for line in lines)
    counted = [line["skipped_steps"] for line in lines]
    assert counted[0] == 0 and counted[-1] == done.stdout.count("is left out: the loss is")
    assert counted[-3:] == [counted[-1] - 2, counted[-1] - 1, counted[-1]]
    # Weights, moments and step counts of the steps that were left out are those of the last one taken.
    kept = checkpoint.complete(run)
    states = [(folder / "rank_00000.safetensors").read_bytes() for folder in kept]
    assert [int(folder.name[5:]) for folder in kept] == [line["step"] for line in lines[-3:]]
    assert states[0] == states[1] == states[2]


@pytest.fixture
def stopped(finished, shards, tmp_path) -> Path:
    """The run as a kill after step 20 leaves it, with the pictures that it keeps decoded until its end."""
    run = tmp_path / "stopped"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("step_00000024", "export"))
    (run / "manifest.json").unlink()
    spec = ImageSpec(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    alone = {"seed": 0, "rank": 0, "world_size": 1, "cache": run / "decoded"}
    list(Loader(Shards(shards), LoaderConfig(batch=10, chunk=10), spec, lambda _: {}, **alone).batches(0, 10))
    assert (run / "decoded.data.u8").stat().st_size == 100 * (12 + 32 * 32 * 3)
    return run


def refusal(shards: Path, run: Path) -> str:
    """The line that `gemsmith train` refuses to go on with."""
    done = gemsmith("train", *arguments(shards, run), "--ranks", 2, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()  # nothing was launched
    return line


def test_checkpoints_that_cannot_be_resumed_are_refused_before_anything_starts(stopped, shards):
    folder = checkpoint.step_folder(stopped, 20)
    file, manifest = folder / "rank_00001.safetensors", folder / "manifest.json"
    whole, facts = file.read_bytes(), json.loads(manifest.read_text())

    facts["config"]["mmgem"]["language"]["hidden_size"] = 48  # as of a run with another model, copied here
    manifest.write_text(json.dumps(facts))
    line = refusal(shards, stopped)
    assert line.startswith(f"error: --out {folder}: is a checkpoint of another model"), line
    assert "another mmgem.language.hidden_size; delete that folder, or" in line

    file.write_bytes(whole[:-100])
    line = refusal(shards, stopped)
    assert f"{file.name} has {len(whole) - 100} bytes of {len(whole)}" in line and "delete that folder and" in line

    file.unlink()
    line = refusal(shards, stopped)
    assert f"{file.name} is missing" in line and "the run resumes from the one before" in line


def start_in(room: int, shards: Path, run: Path) -> tuple[int, str]:
    """(exit code, output) of ranks whose writes past so many bytes of a file fail, as on a full disk."""
    process = start(shards, run)
    ranks = wait_for(lambda: len(found := list((run / "ranks").glob("*.pid"))) == 2 and found)
    for file in ranks:
        number = int(wait_for(file.read_text))
        resource.prlimit(number, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_no_room_for_the_figures_of_a_step_is_one_line(stopped, shards):
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    code, output = start_in(len("".join(lines[:20])) + 100, shards, stopped)
    assert code == 2 and "resuming after step 20" in output and "Traceback" not in output, output[-3000:]
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert any(x.startswith(f"error: --out {stopped}: a file grows beyond the limit") for x in said), said
    assert all("a file grows" in x or "has ended on rank 0" in x for x in said)
    assert [p.name for p in checkpoint.complete(stopped)] == ["step_00000016", "step_00000020"]


def test_without_a_manifest_or_room_the_checkpoint_before_counts(finished, stopped, shards):
    """Resumed from before a checkpoint without manifest; then the disk is full, and then it has room again."""
    (checkpoint.step_folder(stopped, 20) / "manifest.json").unlink()
    code, output = start_in(100_000, shards, stopped)  # a rank's part of a checkpoint is larger
    assert code == 2 and "resuming after step 16" in output, output[-2000:]
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert said and all("the checkpoint could not be written" in x and "make room" in x for x in said), output[-2000:]
    assert "Traceback" not in output
    assert [p.name for p in checkpoint.complete(stopped)] == ["step_00000016"]

    done = gemsmith("train", *arguments(shards, stopped), "--ranks", 2)
    assert "resuming after step 16" in done.stdout
    expected, found = state_of(finished), state_of(stopped)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(checkpoint.step_folder(stopped, 20).glob("*.part"))
