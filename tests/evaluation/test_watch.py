import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from curation.errors import UserError
from curation.manifest import write_manifest
from evaluation import results
from evaluation.watch import watch
from training.checkpoint import Saver, complete, step_folder


class Loader:
    """Reads the weights' seed from the checkpoint; a folder that is not complete is a failure of the test."""

    def __init__(self, make_model):
        self.make_model = make_model
        self.loaded: list[str] = []

    def __call__(self, checkpoint):
        if not (checkpoint / "manifest.json").exists():
            raise AssertionError(f"{checkpoint} was touched before its manifest")
        if not (checkpoint / "weights").exists():
            raise UserError(f"{checkpoint}: no weights")
        seed, size = (checkpoint / "weights").read_text().split()
        if size != "whole":
            raise AssertionError(f"{checkpoint} is half written")
        self.loaded.append(checkpoint.name)  # read to the end: a test may remove it now
        return self.make_model(int(seed), step=int(checkpoint.name[5:]))


@pytest.fixture
def loader(make_model):
    return Loader(make_model)


def land(run, step, pause=0.0):
    """A checkpoint as a trainer writes it: folder, half a file, the whole file, manifest last."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for text in (str(step), f"{step} who", f"{step} whole"):
        (folder / "weights").write_text(text)
        time.sleep(pause)
    write_manifest(folder / "manifest.json", {})  # in one rename: the watch goes by its time
    return folder


def options(tmp_path, pairs_folder, loader):
    return {
        "run": tmp_path / "run",
        "tasks": ["retrieval", "captioning"],
        "data": pairs_folder,
        "out": tmp_path / "results.jsonl",
        "poll_seconds": 0.01,
        "load": loader,
    }


def test_checkpoints_are_graded_as_they_land_and_never_half_written(tmp_path, pairs_folder, loader, capsys):
    arguments = options(tmp_path, pairs_folder, loader)

    def train():
        time.sleep(0.1)
        for step in (10, 20, 30):
            land(arguments["run"], step, pause=0.06)
        (arguments["run"] / "checkpoints" / "step_00000040").mkdir()  # a save that never ended
        (arguments["run"] / "manifest.json").write_text("{}")

    trainer = threading.Thread(target=train)
    trainer.start()
    graded = watch(**arguments, idle_seconds=60)
    trainer.join()
    assert graded == 3
    assert loader.loaded == ["step_00000010", "step_00000020", "step_00000030"]
    rows = results.read(arguments["out"])
    assert sorted({row["step"] for row in rows}) == [10, 20, 30]
    assert {row["task"] for row in rows} == {"retrieval", "captioning"}
    assert "3 of 3 checkpoints graded" in capsys.readouterr().out


def test_a_checkpoint_without_manifest_is_not_listed(tmp_path):
    for step in (2, 10, 1):
        land(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    assert [path.name for path in complete(tmp_path)] == ["step_00000001", "step_00000010"]


def test_a_checkpoint_landing_with_the_end_of_the_run_is_not_missed(tmp_path, pairs_folder, loader):
    """The last checkpoint and the run's manifest appear while an earlier one is being graded."""
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 10)

    def load(checkpoint):
        if checkpoint.name == "step_00000010":
            land(arguments["run"], 20)
            (arguments["run"] / "manifest.json").write_text("{}")
        return loader(checkpoint)

    assert watch(**{**arguments, "load": load}) == 2
    assert loader.loaded == ["step_00000010", "step_00000020"]


@pytest.mark.parametrize("kind", [UserError, FileNotFoundError, RuntimeError])
def test_removed_between_listing_and_loading(tmp_path, pairs_folder, loader, capsys, kind):
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 10)
    land(arguments["run"], 20)
    (arguments["run"] / "manifest.json").write_text("{}")

    def load(checkpoint):
        if checkpoint.name == "step_00000010":
            shutil.rmtree(checkpoint)
            raise kind("weights are gone")
        return loader(checkpoint)

    assert watch(**{**arguments, "load": load}) == 1
    assert "step_00000010: removed before it was graded" in capsys.readouterr().out
    assert {row["step"] for row in results.read(arguments["out"])} == {20}


def test_a_bad_checkpoint_is_reported_and_the_next_one_graded(tmp_path, pairs_folder, loader, capsys):
    arguments = options(tmp_path, pairs_folder, loader)
    (land(arguments["run"], 10) / "weights").unlink()
    land(arguments["run"], 20)
    (arguments["run"] / "manifest.json").write_text("{}")
    assert watch(**arguments) == 1
    out = capsys.readouterr().out
    assert "step_00000010: not graded" in out and "no weights" in out and "1 of 2 checkpoints graded" in out


def test_a_defect_is_not_swallowed(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    (land(arguments["run"], 10) / "weights").write_text("10 half")
    with pytest.raises(AssertionError, match="half written"):
        watch(**arguments)


def test_a_checkpoint_whose_files_are_seen_late_is_graded_and_one_whose_are_not_is_named(
    tmp_path, pairs_folder, loader, capsys, monkeypatch
):
    """As a file system shows another host's files: the manifest first."""
    arguments = options(tmp_path, pairs_folder, loader)
    late, never = land(arguments["run"], 10), land(arguments["run"], 20)
    for folder in (late, never):
        (folder / "weights").rename(folder / "elsewhere")
        write_manifest(folder / "manifest.json", {"files": {"weights": 8}})
    (arguments["run"] / "manifest.json").write_text("{}")
    monkeypatch.setattr("training.checkpoint.APPEARS_S", 3.0)
    timer = threading.Timer(0.5, (late / "elsewhere").rename, (late / "weights",))
    monkeypatch.setattr("evaluation.watch.limit_threads", lambda _: timer.start())  # when it begins to look
    assert watch(**arguments) == 1
    assert loader.loaded == ["step_00000010"]
    assert "step_00000020: not graded: " in capsys.readouterr().out


def test_a_second_watch_grades_nothing_twice(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 10)
    (arguments["run"] / "manifest.json").write_text("{}")
    assert watch(**arguments) == 1
    before = arguments["out"].read_bytes()
    assert watch(**arguments) == 1
    assert arguments["out"].read_bytes() == before


def test_a_dead_run_ends_by_the_idle_limit(tmp_path, pairs_folder, loader, capsys):
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 10)
    assert watch(**arguments, idle_seconds=0.2) == 1
    assert "gave up waiting" in capsys.readouterr().out


def test_a_run_that_is_not_there_yet_is_waited_for_with_one_line(tmp_path, pairs_folder, loader, capsys):
    arguments = options(tmp_path, pairs_folder, loader)
    assert watch(**arguments, idle_seconds=0.1) == 0
    assert capsys.readouterr().out.count("run: no such folder yet, waiting") == 1
    arguments["run"].mkdir()
    assert watch(**arguments, idle_seconds=0.1) == 0
    assert capsys.readouterr().out.count("run: no checkpoint yet, waiting") == 1


def test_wrong_data_is_refused_before_waiting(tmp_path, loader):
    with pytest.raises(UserError, match="no such folder"):
        watch(**options(tmp_path, tmp_path / "absent", loader))


SCRIPT = """
import sys
from pathlib import Path
from curation.errors import UserError
from evaluation.watch import watch

def load(checkpoint):
    print("loading", flush=True)
    raise UserError("not yet")

run, data, out = map(Path, sys.argv[1:])
watch(run=run, tasks=["retrieval"], data=data, out=out, poll_seconds=600, load=load)
"""


def test_sigterm_ends_it_cleanly(tmp_path, pairs_folder):
    """While it waits between two looks, of which the second would be ten minutes later."""
    land(tmp_path / "run", 10)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(pairs_folder), str(tmp_path / "r.jsonl")]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert "loading\n" in process.stdout, "it looks, so it listens"
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped, 0 checkpoints graded" in rest


def test_rows_carry_the_step_for_the_curves(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 7)
    (arguments["run"] / "manifest.json").write_text("{}")
    watch(**arguments)
    line = json.loads(arguments["out"].read_text().splitlines()[0])
    assert (line["step"], Path(line["checkpoint"]).name) == (7, "step_00000007")


def test_the_best_checkpoint_is_named_and_outlives_the_others(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    run = arguments["run"]
    for step in (10, 20, 30):
        land(run, step)
    (run / "manifest.json").write_text("{}")
    metric = "image_to_text_mrr"
    watch(**arguments, best=f"retrieval.{metric}")
    values = {row["step"]: row["value"] for row in results.read(arguments["out"]) if row["metric"] == metric}
    record = json.loads((run / "best.json").read_text())
    step = max(values, key=values.__getitem__)
    assert (record["checkpoint"], record["value"]) == (f"step_{step:08d}", values[step])
    for folder in complete(run):
        save_file({}, folder / "rank_00000.safetensors", {"table": json.dumps({"stretches": {}, "weights": ""})})
    Saver(run, keep_last=1)._close(step_folder(run, 30), {"world_size": 1, "shapes": {}})
    assert {p.name for p in complete(run)} == {f"step_{step:08d}", "step_00000030"}


def test_a_metric_that_no_task_gives_is_named(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    land(arguments["run"], 10)
    with pytest.raises(UserError, match=r"--best retrieval\.accuracy.*image_to_text_mrr"):
        watch(**arguments, best="retrieval.accuracy")
    with pytest.raises(UserError, match="begins with no task"):
        watch(**arguments, best="accuracy")
    with pytest.raises(UserError, match="median_rank: less of it is better"):
        watch(**arguments, best="retrieval.image_to_text_median_rank")
    with pytest.raises(UserError, match="--threads 0: is below 1"):
        watch(**arguments, threads=0)


def test_a_run_that_is_begun_anew_is_graded_anew(tmp_path, pairs_folder, loader):
    arguments = options(tmp_path, pairs_folder, loader)
    run = arguments["run"]
    found = threading.Thread(target=lambda: watch(**arguments, idle_seconds=60))
    land(run, 10)
    found.start()
    try:
        for times in (1, 2):
            while len(loader.loaded) < times:
                assert found.is_alive(), f"the watch ended after {loader.loaded}"
                time.sleep(0.01)
            if times == 1:  # though no look falls between the two
                shutil.rmtree(run / "checkpoints")
                land(run, 10)
    finally:
        (run / "manifest.json").write_text("{}")
        found.join()
    assert loader.loaded == ["step_00000010"] * 2
