"""FLAVA on two ranks: its step against one plain process, and a run over three streams that is cut off and goes on."""

import json
import shutil

import pytest
import torch

from tests.conftest import gemsmith
from tests.training.conftest import FLAVA, flava_config, write_shards
from tests.training.plain import assert_a_plain_step
from tests.training.ranks import launched
from tests.training.step import chunks_of
from training import checkpoint
from training.data import Shards
from training.families import build
from training.optim import MOMENTS
from training.zero import Stretch

BATCH = ("--loader.batch", "32", "--loader.chunk", "8", "--precision", "fp32")


@pytest.mark.parametrize("more", [("--loader.retain", "0"), ("--activation_checkpointing", "true")], ids=["", "again"])
def test_a_batch_of_pairs_equals_one_plain_process(shards, tmp_path, more):
    """Float32 under ZeRO-3 and the real launcher, mismatched pairs among the rows."""
    run, overrides = tmp_path / "run", (*BATCH, *more)
    saved, _ = launched(shards, run, "3", "flava", *overrides)
    config = flava_config(*overrides)
    family = build(config, run / "flava" / "tokenizer", Shards(shards).every_caption)
    (batch,) = chunks_of(shards, family, config, 32)
    assert 0 < (batch["itm_labels"] == 0).sum() < 32 and batch["valid"].all()
    exact = assert_a_plain_step(saved, family.model, [batch], config.objective)
    norms = {name: float(g.norm()) for name, g in exact.items()}
    assert max(norms.values()) < 0.7 * sum(n**2 for n in norms.values()) ** 0.5, "one parameter has all of the step"
    assert saved["gradients"]["itm_head.seq_relationship.weight"].any()


STEPS, CUT = 6, 4
STREAMS = "{pairs: {kind: pairs}, images: {kind: images}, texts: {kind: texts}}"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of `gemsmith train`: a batch of each stream in turn, and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("streams")
    words = ["--config", "recipes/train/tiny_flava.yaml", *FLAVA, "--precision", "fp32", "--optim.warmup_steps", "2"]
    words += ["--loader.batch", "16", "--loader.chunk", "4", "--loader.retain", "4", "--loader.unit", "16"]
    words += ["--loader.sources", STREAMS, "--loader.mixing", "round_robin", "--samples", str(STEPS * 16)]
    words += ["--checkpoint_every", "1", "--keep_last", str(STEPS), "--log_every", "1", "--ranks", "2"]
    for name, sizes in {"pairs": [30, 20], "images": [25], "texts": [35]}.items():
        words += ["--data", f"{name}={write_shards(folder / name, sizes)}"]
    return words


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    gemsmith("train", *arguments, "--out", run)
    return run


def state_of(run, step):
    """{weights or a moment: {parameter: flat tensor}} after a step."""
    reader = checkpoint.Reader(checkpoint.step_folder(run, step))
    found = {}
    for kind in (checkpoint.WEIGHTS, *MOMENTS):
        for name, shape in reader.manifest["shapes"].items():
            whole = torch.empty(torch.Size(shape).numel())
            reader.read(kind, Stretch(name, 0, 0, whole.numel()), whole)
            found.setdefault(kind, {})[name] = whole
    return found


def losses_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


OWN = {"images": ("image_model.", "mim_head."), "texts": ("text_model.", "mlm_head.")}
LOSSES = {"pairs": {"embed", "itm", "mmm_image", "mmm_text"}, "images": {"mim"}, "texts": {"mlm"}}


def test_each_stream_has_its_losses_and_moves_its_parameters_alone(finished):
    """What a step does not use keeps its bits, weights and moments, through ZeRO-3's flat shards."""
    states = [state_of(finished, step) for step in range(1, STEPS + 1)]
    for number, line in enumerate(losses_of(finished)):
        stream = list(LOSSES)[number % 3]
        assert {n.removeprefix("loss_") for n in line if n.startswith("loss_")} == LOSSES[stream]
        assert line["loss"] > 0 and line["errors"] == 0
        if number and stream != "pairs":
            before, after = states[number - 1], states[number]
            for kind in before:
                moved = {n for n in before[kind] if not torch.equal(before[kind][n], after[kind][n])}
                assert moved and all(name.startswith(OWN[stream]) for name in moved), (stream, kind, moved)
            # The moments of all that the stream uses have moved: every weight with a gradient, mask token and all.
            assert {f"{OWN[stream][0]}layernorm.weight", f"{OWN[stream][1]}decoder.weight"} <= moved
    reader = checkpoint.Reader(checkpoint.step_folder(finished, STEPS))
    taken = {name: {piece.steps for piece in pieces} for name, pieces in reader.pieces.items()}
    assert taken["mim_head.decoder.weight"] == taken["mlm_head.decoder.weight"] == {2}
    assert taken["log_scale"] == taken["itm_head.seq_relationship.bias"] == {2}
    assert taken["image_model.layernorm.weight"] == {4}


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(finished, arguments, tmp_path):
    """As a SIGKILL while step 5 is being saved leaves it."""
    run = shutil.copytree(finished, tmp_path / "killed")
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "export")
    shutil.rmtree(checkpoint.step_folder(run, STEPS))
    (checkpoint.step_folder(run, CUT + 1) / "manifest.json").unlink()
    done = gemsmith("train", *arguments, "--out", run)
    assert f"resuming after step {CUT}" in done.stdout
    expected, found = state_of(finished, STEPS), state_of(run, STEPS)
    assert all(torch.equal(expected[kind][name], found[kind][name]) for kind in expected for name in expected[kind])
    assert [line["loss"] for line in losses_of(run)] == [line["loss"] for line in losses_of(finished)]
