"""InfoNCE in closed form against the loss pair by pair, torch's cross-entropy and open_clip's ClipLoss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.training.coupled_oracle import as_dict, assert_close, batch, gradients, infonce
from training.distributed import World
from training.objectives.coupled import Rows
from training.objectives.infonce import InfoNCE


def run(made, **settings_):
    return as_dict(InfoNCE(**settings_)(*made, World()))


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(2, 14),
    m=st.integers(1, 3),
    holes=st.integers(0, 3),
    groups=st.sampled_from([0, 1, 4]),
    scale=st.sampled_from([1.0, 14.0, 100.0]),
    tile=st.integers(1, 16),
    keep=st.sampled_from([0, 30, 10_000]),
    duplicates=st.sampled_from(["negative", "masked", "positive"]),
    directions=st.sampled_from(["both", "left_to_right"]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_autograds(
    b, m, holes, groups, scale, tile, keep, duplicates, directions, reduction, seed
):
    made = batch(b=b, m=m, holes=holes, groups=groups, scale=scale, seed=seed)
    said = {"duplicates": duplicates, "directions": directions, "reduction": reduction}
    expected = gradients(infonce, *made, **said)
    assert_close(run(made, tile=tile, keep=keep, **said), expected, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_positives_are_soft_targets_of_cross_entropy(reduction):
    """UniCL's form: targets spread evenly over the rows of one label."""
    made = batch(b=24, groups=5, seed=2)
    left, right, scalars, rows = made
    s = scalars["log_scale"].exp() * left @ right[:, 0].T
    same = (rows.groups[:, None] == rows.groups).double()
    target = same / same.sum(1, keepdim=True)
    value = F.cross_entropy(s, target) + F.cross_entropy(s.T, target)
    found = run(made, duplicates="positive", reduction=reduction, tile=7)["value"]
    torch.testing.assert_close(found, value / 2 if reduction == "mean" else value, rtol=1e-12, atol=0)


def test_numbers_are_open_clips():
    from open_clip.loss import ClipLoss

    left, right, scalars, rows = batch(b=50, width=16)
    leaves = [x.clone().requires_grad_() for x in (left, right[:, 0], scalars["log_scale"])]
    value = ClipLoss()(leaves[0], leaves[1], leaves[2].exp())
    value.backward()
    names = ("left", "right", "log_scale")
    expected = {"value": value.detach(), **{name: x.grad for name, x in zip(names, leaves)}}
    assert_close(run((left, right, scalars, rows), tile=16), expected, 1e-12)


@pytest.mark.parametrize("directions", ["both", "left_to_right"])
def test_a_hole_is_as_if_it_were_not_there(directions):
    """Holes that are copies of rows, the hardest of negatives, if they counted."""
    left, right, scalars, rows = batch(b=9, m=2, seed=4)
    whole = run((left, right, scalars, rows), directions=directions)
    holed = (torch.cat([left, left[:4]]), torch.cat([right, right[:4]]), scalars)
    valid = torch.arange(13) < 9
    right_valid = torch.cat([rows.right_valid, torch.ones(4, 2, dtype=torch.bool)])
    right_valid[11, 0] = False
    valid[11] = True  # a row that lacks its positive is a hole as well
    found = run((*holed, Rows(valid, right_valid)), tile=4, directions=directions)
    assert not found["left"][9:].any() and not found["right"][9:].any()
    found |= {name: found[name][:9] for name in ("left", "right")}
    assert_close(found, whole, 1e-13)
    counting = run((*holed, Rows(torch.ones(13, dtype=torch.bool), right_valid.fill_(True))), directions=directions)
    assert abs(counting["value"] - whole["value"]) > 0.1


@pytest.mark.parametrize("hole", [None, 3])
def test_nan_embeddings_show_in_the_loss(hole):
    left, right, scalars, rows = batch(b=8, dtype=torch.float32)
    if hole is not None:
        rows.valid[hole] = False
    left[5] = torch.nan
    found = run((left, right, scalars, rows))
    assert found["value"].isnan() and found["left"][5].isnan().all()


@pytest.mark.parametrize("tile", [1024, 16])
@pytest.mark.parametrize("keep", [0, 10**6])
def test_logits_of_plus_and_minus_100_are_stable_in_float32(tile, keep):
    """Rows that fit nothing, not even their positive: their sums are e^-100 beside others of e^100."""
    left, _, scalars, rows = batch(b=64, width=8, scale=100.0, dtype=torch.float32)
    made = (left, torch.cat([left[:32], -left[32:]])[:, None], scalars, rows)
    assert_close(run(made, tile=tile, keep=keep), gradients(infonce, *made), 2e-5)
    lonely = torch.zeros(64, 8)
    lonely[:, 0] = 1.0
    lonely[0, 0] = -1.0
    made = (lonely, lonely.abs()[:, None], scalars, rows)
    assert_close(run(made, tile=tile, keep=keep), gradients(infonce, *made), 2e-5)


def test_float32_and_bfloat16_at_scale_100_are_as_near_float64_as_their_products():
    left, right, scalars, rows = batch(b=200, width=64, scale=100.0, dtype=torch.float32)
    made = (left, F.normalize(right + 0.3 * left[:, None], dim=-1), scalars, rows)
    assert_close(run(made, tile=64), gradients(infonce, *made), 1e-5)
    half = (*(x.bfloat16() for x in made[:2]), *made[2:])
    found = run(half, tile=64)
    assert found["left"].dtype == found["right"].dtype == found["value"].dtype == torch.float32
    assert_close(found, gradients(infonce, *half), 1e-5)


def test_one_candidate_costs_nothing():
    found = run(batch(b=1, dtype=torch.float32))
    assert math.isclose(float(found["value"]), 0.0, abs_tol=1e-6) and float(found["left"].abs().max()) < 1e-5
