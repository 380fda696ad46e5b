"""InfoNCE in closed form against autograd through torch's cross-entropy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from training.distributed import World
from training.objectives.infonce import InfoNCE


def oracle(left, right, log_scale, valid, reduction):
    """The textbook loss over the rows that count, by autograd."""
    left, right, log_scale = (x.clone().requires_grad_() for x in (left, right, log_scale))
    s = log_scale.exp() * left[valid] @ right[valid].T
    target = torch.arange(len(s))
    loss = F.cross_entropy(s, target) + F.cross_entropy(s.T, target)
    loss = loss / 2 if reduction == "mean" else loss
    loss.backward()
    return loss.detach(), left.grad, right.grad, log_scale.grad


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(2, 40),
    tile=st.integers(1, 50),
    holes=st.integers(0, 3),
    temperature=st.sampled_from([1.0, 0.07, 0.01]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_autograds(b, tile, holes, temperature, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (F.normalize(torch.randn(b, 12, dtype=torch.float64, generator=generator), dim=1) for _ in range(2))
    valid = torch.ones(b, dtype=torch.bool)
    valid[torch.randperm(b, generator=generator)[: min(holes, b - 1)]] = False
    log_scale = -torch.tensor([temperature], dtype=torch.float64).log()
    out = InfoNCE(reduction=reduction, tile=tile)(left, right, log_scale, valid, World())
    value, d_left, d_right, d_log_scale = oracle(left, right, log_scale, valid, reduction)
    torch.testing.assert_close(out.value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.left, d_left, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.right, d_right, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.log_scale.reshape(1), d_log_scale, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hole", [None, 3])
def test_nan_embeddings_show_in_the_loss(hole):
    left = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    valid = torch.ones(8, dtype=torch.bool)
    if hole is not None:
        valid[hole] = False
    broken = left.clone()
    broken[5] = torch.nan
    out = InfoNCE()(broken, left, torch.tensor([0.0]), valid, World())
    assert out.value.isnan() and out.left[5].isnan().all()


@pytest.mark.parametrize("tile", [1024, 16])
def test_scale_100_is_stable_in_float32(tile):
    """Logits of +-100, whose exponentials float32 cannot hold."""
    left = F.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    right = torch.cat([left[:32], -left[32:]])
    valid, log_scale = torch.ones(64, dtype=torch.bool), torch.tensor([100.0]).log()
    out = InfoNCE(tile=tile)(left, right, log_scale, valid, World())
    value, d_left, *_ = oracle(left.double(), right.double(), log_scale.double(), valid, "mean")
    assert torch.isfinite(out.left).all()
    torch.testing.assert_close(out.value.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.left.double(), d_left, rtol=1e-3, atol=1e-5)
