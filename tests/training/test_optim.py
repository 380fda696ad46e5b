"""The schedule against torch's own schedulers, step by step; parameter groups, and what they may not say."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from curation.errors import UserError
from tests.training.conftest import tiny_config
from training.config import GroupConfig, OptimConfig
from training.optim import factor, parameter_groups, set_lr

STEPS = 23


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(3, 2), nn.Linear(2, 1)


def optimizer_of(config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameter_groups(Toy().named_parameters(), config))


def rates(config: OptimConfig, first: int = 0) -> list[list[float]]:
    """Of every group at each step from `first` on, as a run sets them that begins or resumes there."""
    optimizer, found = optimizer_of(config), []
    for step in range(first, STEPS):
        set_lr(optimizer, factor(step, STEPS, config))
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def rates_of_torch(config: OptimConfig) -> list[list[float]]:
    optimizer, warmup, found = optimizer_of(config), config.warmup_steps, []
    up = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1) if warmup else None
    rest = max(1, STEPS - warmup)
    scheduler = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0, rest),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rest),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, rest),
    }[config.schedule]()
    if up is not None:
        scheduler = lr_scheduler.SequentialLR(optimizer, [up, scheduler], [warmup])
    for _ in range(STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of torch's own SequentialLR
@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS + 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_step_has_torchs_rate_also_after_a_resume(schedule, warmup):
    groups = [GroupConfig(pattern="^head", lr=3e-3)]
    config = OptimConfig(lr=2e-2, weight_decay=0.0, schedule=schedule, warmup_steps=warmup, groups=groups)
    found = rates(config)
    assert len(found[0]) == 2
    for step, (ours, theirs) in enumerate(zip(found, rates_of_torch(config), strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-16), step
    for middle in (3, 7, 15):
        assert rates(config, middle) == found[middle:]


def test_each_parameter_has_its_groups_rate_and_decay():
    model, plain = Toy(), OptimConfig(lr=2e-2, weight_decay=0.1)
    groups = [GroupConfig(pattern="^tower", lr=3e-3, weight_decay=0.3), GroupConfig(pattern=r"head\.bias", frozen=True)]
    config = OptimConfig(lr=plain.lr, weight_decay=plain.weight_decay, groups=groups)
    found = {
        id(p): (g["lr"], g["base_lr"], g["weight_decay"])
        for g in parameter_groups(model.named_parameters(), config)
        for p in g["params"]
    }
    assert {name: found.get(id(p)) for name, p in model.named_parameters()} == {
        "tower.weight": (3e-3, 3e-3, 0.3),
        "tower.bias": (3e-3, 3e-3, 0.0),  # biases are never decayed
        "head.weight": (2e-2, 2e-2, 0.1),
        "head.bias": None,
    }
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    none = [GroupConfig(pattern="bias$", lr=1.0, weight_decay=0.0)]  # says what is so in any case
    assert parameter_groups(Toy().named_parameters(), OptimConfig(groups=none))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"pattern": "^nowhere", "lr": 1.0}], r"the pattern '\^nowhere' matches no parameter; mend"),
        (
            [{"pattern": "^head", "lr": 1.0}, {"pattern": "bias$", "frozen": True}],
            r"head\.bias is matched by '\^head' and 'bias\$'; narrow one",
        ),
        (
            [{"pattern": "bias$", "weight_decay": 0.1}],
            r"'bias\$' decays nothing: biases, norms.*remove its weight_decay",
        ),
        ([{"pattern": "", "frozen": True}], "every parameter is frozen; leave one group"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_in_one_line(groups, said):
    config = OptimConfig(groups=[GroupConfig(**group) for group in groups])
    with pytest.raises(UserError, match=f"^optim.groups: {said}") as error:
        parameter_groups(Toy().named_parameters(), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optim.groups", "[{pattern: ^llm, rate: 1.0}]"), "optim.groups.*rate"),
        (("--optim.groups", "[{pattern: '(llm'}]"), r"optim\.groups: '\(llm' is no regular expression"),
        (("--optim.groups", "[{pattern: ^llm, frozen: true, lr: 1.0}]"), r"'\^llm' is frozen and has a rate"),
        (("--optim.rate", "1.0"), "optim.rate"),
        (("--optim.lr", "-1.0"), r"optim\.lr: -1\.0 is below 0"),
        (("--optim.lr", ".nan"), r"optim\.lr: nan is below 0"),
        (("--optim.warmup_steps", "-1"), r"optim\.warmup_steps: -1 is below 0"),
        (("--optim.betas", "[0.9, 1.0]"), r"optim\.betas: \[0\.9, 1\.0\] are not in \[0, 1\)"),
        (("--optim.betas", "[-0.1, 0.9]"), r"optim\.betas: \[-0\.1, 0\.9\] are not in"),
        (("--optim.eps", "0"), r"optim\.eps: 0\.0 is not above 0"),
    ],
)
def test_a_recipe_with_a_wrong_key_or_value_is_refused_in_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        tiny_config(*words)
    assert "\n" not in str(error.value)
