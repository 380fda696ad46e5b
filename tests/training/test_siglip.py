"""SigLIP in closed form against the loss pair by pair and open_clip's SigLipLoss."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.coupled_oracle import as_dict, assert_close, batch, gradients, siglip
from training.config import ObjectiveConfig
from training.distributed import World
from training.models.scalars import add_scalars
from training.objectives.coupled import Rows
from training.objectives.siglip import SigLIP


def run(made, **settings_):
    return as_dict(SigLIP(**settings_)(*made, World()))


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(2, 12),
    m=st.integers(1, 3),
    holes=st.integers(0, 3),
    groups=st.sampled_from([0, 1, 4]),
    scale=st.sampled_from([1.0, 14.0, 100.0]),
    tile=st.integers(1, 16),
    duplicates=st.sampled_from(["negative", "masked", "positive"]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_autograds(b, m, holes, groups, scale, tile, duplicates, seed):
    made = batch(b=b, m=m, holes=holes, groups=groups, scale=scale, seed=seed)
    expected = gradients(siglip, *made, duplicates=duplicates)
    assert_close(run(made, tile=tile, duplicates=duplicates), expected, 1e-11)


def test_numbers_are_open_clips():
    from open_clip.loss import SigLipLoss

    left, right, scalars, rows = batch(b=50, width=16)
    leaves = {"left": left, "right": right[:, 0], **scalars}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    value = SigLipLoss()(leaves["left"], leaves["right"], leaves["log_scale"].exp(), leaves["logit_bias"])
    value.backward()
    expected = {"value": value.detach(), **{name: x.grad for name, x in leaves.items()}}
    assert_close(run((left, right, scalars, rows), tile=16), expected, 1e-12)


def test_a_hole_is_as_if_it_were_not_there():
    left, right, scalars, rows = batch(b=9, m=2, seed=4)
    whole = run((left, right, scalars, rows))
    holed = (torch.cat([left, left[:4]]), torch.cat([right, right[:4]]), scalars)
    right_valid = torch.cat([rows.right_valid, torch.ones(4, 2, dtype=torch.bool)])
    found = run((*holed, Rows(torch.arange(13) < 9, right_valid)), tile=4)
    assert not found["left"][9:].any() and not found["right"][9:].any()
    found |= {name: found[name][:9] for name in ("left", "right")}
    assert_close(found, whole, 1e-13)


def test_scale_100_is_stable_in_float32_and_with_bfloat16_embeddings():
    left, _, scalars, rows = batch(b=64, width=8, scale=100.0, dtype=torch.float32)
    made = (left, torch.cat([left[:32], -left[32:]])[:, None], scalars, rows)
    assert_close(run(made, tile=16), gradients(siglip, *made), 1e-5)
    half = (*(x.bfloat16() for x in made[:2]), *made[2:])
    assert_close(run(half, tile=16), gradients(siglip, *half), 1e-5)


def test_scalars_begin_where_their_papers_have_them():
    """SigLIP's scale at 10 and bias at -10, CLIP's scale at 1 / 0.07; a pretrained model's own and the recipe's win."""
    for objective, own, expected in [
        ({"coupled": "siglip"}, {}, {"log_scale": math.log(10), "logit_bias": -10}),
        ({"coupled": "infonce"}, {}, {"log_scale": -math.log(0.07)}),
        ({"coupled": "siglip"}, {"log_scale": 4.0}, {"log_scale": 4.0, "logit_bias": -10}),
        (
            {"coupled": "siglip", "temperature": 0.5, "logit_bias": -4.0},
            {"log_scale": 4.0},
            {"log_scale": math.log(2), "logit_bias": -4},
        ),
    ]:
        model = torch.nn.Module()
        assert add_scalars(model, ObjectiveConfig(**objective), own) == tuple(expected)
        for name, value in expected.items():
            assert torch.equal(getattr(model, name).detach(), torch.tensor([float(value)]))
