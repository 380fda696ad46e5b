"""Bounds and schedules of the temperature."""

import math

import pytest
import torch

from curation.errors import UserError
from training.config import ObjectiveConfig
from training.objectives import COUPLED, build
from training.objectives.temperature import bounded, log_scale_at, scheduled


@pytest.mark.parametrize(
    ("temperature", "used", "raising", "lowering"),
    [(0.005, 0.01, True, False), (0.07, 0.07, True, True), (2.0, 0.5, False, True)],
)
def test_outside_its_bounds_only_gradients_that_lead_back_pass(temperature, used, raising, lowering):
    """A positive gradient makes descent lower log(1/temperature): it raises the temperature."""
    for sign, passes in ((1.0, raising), (-1.0, lowering)):
        parameter = torch.tensor([-math.log(temperature)], requires_grad=True)
        log_scale = bounded(1.0 * parameter, 0.01, 0.5)
        torch.testing.assert_close(log_scale.detach(), torch.tensor([-math.log(used)]))
        (sign * log_scale).sum().backward()
        assert parameter.grad.tolist() == [sign if passes else 0.0]


def test_bounds_hold_without_a_graph():
    with torch.no_grad():
        assert math.isclose(float(bounded(torch.tensor([9.0]), 0.01, 1.0)), math.log(100), rel_tol=1e-6)


def test_schedules_begin_and_end_where_they_should():
    assert scheduled(ObjectiveConfig(temperature_schedule="constant"), 0.1, 70, 101) == 0.1
    moving = {
        kind: ObjectiveConfig(temperature=0.1, temperature_end=0.02, temperature_schedule=kind)
        for kind in ("linear", "cosine")
    }
    for config in moving.values():
        assert [round(scheduled(config, 0.1, step, 101), 9) for step in (0, 50, 100)] == [0.1, 0.06, 0.02]
    assert scheduled(moving["cosine"], 0.1, 10, 101) > scheduled(moving["linear"], 0.1, 10, 101)


def test_a_scheduled_temperature_leaves_its_parameter_alone():
    parameter = torch.tensor([3.0], requires_grad=True)
    config = ObjectiveConfig(temperature=0.1, temperature_end=0.05, temperature_schedule="linear")
    log_scale = log_scale_at(parameter, config, 10, 11)
    torch.testing.assert_close(log_scale.detach(), torch.tensor([-math.log(0.05)]))
    log_scale.sum().backward()
    assert parameter.grad.tolist() == [0.0]


@pytest.mark.parametrize(("kind", "end", "used"), [("constant", None, 0.01), ("linear", 0.05, 0.03)])
def test_without_a_temperature_a_schedule_begins_at_the_model_s_own(kind, end, used):
    config = ObjectiveConfig(temperature=None, temperature_end=end, temperature_schedule=kind)
    pretrained = torch.tensor([math.log(100)])
    torch.testing.assert_close(log_scale_at(pretrained, config, 5, 11), torch.tensor([-math.log(used)]))


def test_settings_reach_the_loss():
    loss = build(ObjectiveConfig(coupled="infonce", directions="left_to_right", duplicates="masked", gather="ring"))
    assert (loss.directions, loss.duplicates, loss.gather) == ("left_to_right", "masked", "ring")
    assert isinstance(build(ObjectiveConfig(coupled="siglip", tile=64)), COUPLED["siglip"])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"temperature_floor": 2.0}, "temperature_floor: 2.0 is above temperature_ceiling 1.0"),
        ({"temperature_ceiling": 0.0}, "temperature_ceiling: 0.0 is not above 0"),
        ({"temperature_schedule": "cosine"}, "temperature_end: cosine needs it"),
        ({"temperature_end": 0.02}, "temperature_end: temperature_schedule learned has none"),
        ({"coupled": "siglip", "directions": "left_to_right"}, "directions: siglip has pairs"),
        ({"tile": 0}, "tile: 0 is not above 0"),
    ],
)
def test_bad_settings_are_named(said, line):
    with pytest.raises(UserError, match=line):
        ObjectiveConfig(**said)
