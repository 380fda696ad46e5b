"""A step's gradients are reduced once, whatever the number of chunks: counted on two ranks, and held against one plain
process, whose batch is whole; and what becomes of a step whose gradient is no number."""

import json
import math

import pytest
import torch

from tests.training.conftest import tiny_config
from tests.training.plain import differences, plain_gradients
from tests.training.rank_reductions import CHUNKS, KEPT, LEAN, SETTINGS
from tests.training.ranks import launch
from tests.training.step import chunks_of
from training.data import Shards
from training.families import build

KIND = {"2": "all_reduce", "3": "reduce_scatter"}
"""How DeepSpeed's stages send gradients of two ranks."""


@pytest.fixture(scope="module")
def steps(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("reductions")
    launch("rank_reductions.py", 2, shards, run)
    config = tiny_config()
    family = build(config, run / "tokenizer", Shards(shards).every_caption)
    expected = plain_gradients(family.model, chunks_of(shards, family, config, 32), config.objective)[1]
    return torch.load(run / "steps.pt", weights_only=True), expected, family.model


@pytest.mark.parametrize("stage", ["2", "3"])
def test_reductions_do_not_grow_with_chunks(steps, stage):
    found, kind = steps[0], KIND[stage]
    sent = {n: found[stage, "fp32", "step", n]["traffic"] for n in CHUNKS}
    print(json.dumps({"stage": stage, **sent}))
    for figure in (f"{kind}_{unit}{step}" for unit in ("calls", "mib") for step in ("", "_1", "_2")):
        assert sent[1][figure] == sent[4][figure] == sent[16][figure] > 0, figure
    numbers = sum(p.numel() for p in steps[2].parameters())
    assert sent[16][f"{kind}_mib"] == pytest.approx(4 * numbers / 2**20, rel=0.02), "every gradient once, in fp32"


def test_only_persistent_weights_are_not_gathered_again(steps):
    """Below `stage3_param_persistence_threshold` 16 chunks gather no more than 4; above it they do, room or no room."""
    gathered = lambda stage, n: steps[0][stage, "fp32", "step", n]["traffic"]["all_gather_mib_2"]  # noqa: E731
    print(json.dumps({s: {n: gathered(s, n) for n in (4, 16)} for s in ("3", KEPT, LEAN)}))
    assert gathered("3", 4) == gathered("3", 16)
    assert gathered(KEPT, 16) > 3 * gathered(KEPT, 4) and gathered(LEAN, 16) > 3 * gathered(LEAN, 4)


def test_reduced_by_chunk_they_do(steps):
    sent = {n: steps[0]["3", "fp32", "chunk", n]["traffic"]["reduce_scatter_mib"] for n in (1, 4)}
    assert sent[4] == pytest.approx(4 * sent[1], rel=0.02)  # beside them, the loss's own


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[1] == "fp32"], ids=lambda s: "-".join(map(str, s)))
def test_gradients_are_the_plain_ones(steps, setting):
    found, expected, _ = steps
    whole, worst = differences(found[setting]["gradients"], expected)
    assert whole < 1e-6 and worst < 1e-6, (whole, worst)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_bf16_chunks_are_summed_and_sent_in_fp32(steps, stage):
    """Twice the bytes of one bf16 reduction; and four chunks' sum is as near the plain gradient as one chunk's."""
    found, expected, model = steps
    one, four = (found[stage, "bf16", "step", n] for n in (1, 4))
    numbers = sum(p.numel() for p in model.parameters())
    assert four["traffic"][f"{KIND[stage]}_mib"] == pytest.approx(4 * numbers / 2**20, rel=0.02)
    errors = [differences(x["gradients"], expected)[0] for x in (one, four)]
    print(json.dumps({"stage": stage, "bf16": errors}))
    assert errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
def test_a_step_whose_gradient_is_no_number_is_left_out(steps, setting):
    """Its loss is one, and its gradient on the other rank: weights, moments and counts stay, and the next is taken."""
    found = steps[0][setting]["spoilt"]
    left_out, taken = found["steps"]
    assert math.isfinite(left_out["loss"]) and not math.isfinite(left_out["grad_norm"])
    assert math.isfinite(taken["loss"]) and math.isfinite(taken["grad_norm"])
    assert left_out["skipped_steps"] == taken["skipped_steps"] == 1 and found["in_a_row"] == [1, 0]
    assert not found["changed"] and not found["stuck"]
