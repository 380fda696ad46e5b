"""How many ranks there are where there are GPUs: by what torch counts, since none of them is touched."""

import os
import subprocess
import sys

import pytest
import torch

from curation.errors import UserError
from jobs import launch, steps
from jobs.cli import COMMANDS
from tests.conftest import ROOT
from training.distributed import check_ranks, open_group


@pytest.mark.parametrize(("gpus", "small"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_small_trainings_take_two_ranks_or_the_one_gpu(monkeypatch, gpus, small):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert steps.ranks() == small
    check_ranks(small)


def test_more_ranks_than_gpus_are_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = ["--config", "recipes/train/tiny_clip.yaml", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"^--ranks 2: each takes a GPU, of which this host has 1; start 1 "):
        COMMANDS["train"][1]([*words, "--ranks", "2"])
    for none in ("0", "-1"):
        with pytest.raises(UserError, match=rf"^--ranks {none}: at least 1"):
            COMMANDS["train"][1]([*words, "--ranks", none])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")  # of the plain launcher, before it meets the others
    with pytest.raises(UserError, match="--num_accelerators 1"):
        open_group()


def test_ranks_told_to_use_the_cores_see_no_gpu():
    """The launcher shows its ranks as many as there are ranks, whatever they are to use."""
    for accelerator, seen in (("cpu", ""), ("cuda", "0,1")):
        environment = {**os.environ, "DS_ACCELERATOR": accelerator, "CUDA_VISIBLE_DEVICES": "0,1"}
        words = [sys.executable, "-c", "import os, training.config; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == seen + "\n", done.stderr


@pytest.mark.parametrize("shown", ["2,3", "GPU-8932f937,GPU-45cba273", ""])
def test_ranks_take_the_gpus_that_the_command_is_shown(monkeypatch, tmp_path, shown):
    """As a scheduler or a neighbour has it, and not the host's first, which the launcher shows its ranks."""
    given = {}

    class Runner:
        pid = -1

        def __init__(self, command, env, **_):
            assert command[command.index("--num_accelerators") + 1] == "2"
            given.update(env)

        def poll(self):
            return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(launch.subprocess, "Popen", Runner)
    monkeypatch.setattr(launch, "_end_orphans", lambda *_: None)
    launch.launch([], tmp_path, 2)
    words = [sys.executable, "-c", "import os, training.config; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    monkeypatch.undo()
    done = subprocess.run(words, cwd=ROOT, env={**given, "CUDA_VISIBLE_DEVICES": "0,1"}, capture_output=True, text=True)
    assert done.stdout.strip() == (shown or "0,1"), done.stderr


def test_claims_are_tried_on_cores(monkeypatch):
    """As they are registered: their steps inherit it, their ranks' launcher too."""
    found: dict[str, str] = {}
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("jobs.reproduce.run.reproduce", lambda *_, **__: found.update(os.environ))
    assert COMMANDS["reproduce"][1](["all"]) == 0
    assert (found["DS_ACCELERATOR"], found["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
