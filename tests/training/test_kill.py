"""SIGKILL at any moment of a two-rank run, again and again, while it saves in the background: the same bits at the end.

GEMSMITH_KILLS says how often (12). The moments are drawn from GEMSMITH_SEED (the clock's, printed): at any point of
the steps that follow a resume's first checkpoint; and every third while a checkpoint is being written, between its
first file and its manifest.
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import gemsmith
from tests.training.test_train import arguments, family_of, seen_of, start, state_of, wait_for
from training import checkpoint

KILLS = int(os.environ.get("GEMSMITH_KILLS", "12"))
SEED = int(os.environ.get("GEMSMITH_SEED", time.time_ns() % 10**6))
STEPS = 20 + 30 * KILLS
MORE = ("--samples", str(STEPS * 32), "--checkpoint_every", "1", "--background_save", "true")


def last_step(run: Path) -> int:
    found = checkpoint.latest(run)
    return int(found.name.removeprefix("step_")) if found else 0


def being_written(run: Path) -> bool:
    """A checkpoint that is newer than all complete ones has files."""
    newer = (f for f in (run / "checkpoints").glob("step_*") if int(f.name.removeprefix("step_")) > last_step(run))
    return any(any(f.iterdir()) for f in newer)


def killed(shards: Path, run: Path, delay: float | None) -> bool:
    """Go on, and kill everything `delay` seconds after the next checkpoint (None: in the midst of a save); whether a
    save was cut off."""
    before, process = last_step(run), start(shards, run, *MORE)
    wait_for(lambda: process.poll() is not None or last_step(run) > before, 600)
    if delay is None:
        wait_for(lambda: process.poll() is not None or being_written(run), 600)
    else:
        time.sleep(delay)
    assert process.poll() is None, f"it ended by itself after step {last_step(run)}"
    for victim in family_of(process.pid):
        victim.kill()
    process.communicate()
    return being_written(run)


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_with_the_same_bits(shards, tmp_path):
    print(f"GEMSMITH_SEED={SEED}")
    draw, run, whole = random.Random(SEED), tmp_path / "killed", tmp_path / "whole"
    cut_off = [killed(shards, run, None if n % 3 == 2 else draw.uniform(0.0, 0.5)) for n in range(KILLS)]
    assert any(cut_off) and not (run / "manifest.json").exists()
    last = last_step(run)
    done = gemsmith("train", *arguments(shards, run, *MORE), "--ranks", 2)
    assert f"resuming after step {last}" in done.stdout

    gemsmith("train", *arguments(shards, whole, *MORE), "--ranks", 2)
    expected, found = state_of(whole), state_of(run)
    assert expected.keys() == found.keys() and len(expected) > 4
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (steps := seen_of(run)) == seen_of(whole) and len(steps) == STEPS
