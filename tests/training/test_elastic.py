"""A run of MM-GEM goes on with another number of ranks: the real engine, ZeRO-3, a frozen tower and two rates.

tests/training/test_zero.py does the same at every stage with a model of a few layers.
"""

import json
import shutil

import pytest
import torch

from tests.conftest import ROOT
from tests.training.conftest import TINY
from tests.training.ranks import launch
from training import checkpoint

HALF, STEPS = 5, 10
GROUPS = "[{pattern: '^vision', frozen: true}, {pattern: '^llm', lr: 5.0e-4}]"


def train(shards, run, ranks: int) -> str:
    """What the first rank said."""
    words = ["--config", "recipes/train/tiny_mmgem.yaml", *TINY, "--optim.groups", GROUPS, "--loader.retain", "4"]
    words += ["--samples", STEPS * 32, "--log_every", 1, "--checkpoint_every", HALF, "--data", shards, "--out", run]
    return launch(str(ROOT / "training/train.py"), ranks, *words)[0]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("elastic") / "whole"
    train(shards, run, 2)
    return run


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.long)])
def test_losses_and_rates_are_those_of_the_run_that_was_not_stopped(whole, shards, tmp_path, ranks):
    run = tmp_path / "resumed"
    last = checkpoint.step_folder(whole, STEPS).name
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(last, "export"))
    (run / "manifest.json").unlink()
    assert f"resuming after step {HALF}" in train(shards, run, ranks)
    expected, found = lines(whole), lines(run)
    assert found[:HALF] == expected[:HALF] and len(found) == STEPS
    worst = 0.0
    for ours, theirs in zip(found[HALF:], expected[HALF:], strict=True):
        for name in ("loss", "loss_embed", "loss_generate"):
            worst = max(worst, abs(ours[name] / theirs[name] - 1))
        rates = [{n: rate for n, rate in line.items() if n.startswith("lr_")} for line in (ours, theirs)]
        assert rates[0] == rates[1] and len(set(rates[0].values())) == 2
    print(json.dumps({"ranks": ranks, "losses": worst}))
    assert worst < 1e-6
    before, after, other = (
        checkpoint.consolidated(checkpoint.step_folder(*of)) for of in ((whole, HALF), (run, STEPS), (whole, STEPS))
    )
    for name, value in after.items():
        if name.startswith("vision."):
            assert torch.equal(value, before[name]), name
        else:
            torch.testing.assert_close(value, other[name], atol=2e-5, rtol=0, msg=name)
    assert any(not torch.equal(after[name], before[name]) for name in after)
