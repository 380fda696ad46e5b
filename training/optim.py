"""Parameter groups by regular expression, and the learning rate as a pure function of the step.

A schedule that is a function needs no state in the checkpoint: step n has the
same rate whether the run was resumed or not.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from curation.errors import UserError
from training.config import OptimConfig


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal learning rate and weight decay; frozen parameters get `requires_grad=False` and no group.

    Raises:
        UserError: a pattern that matches no parameter that trains.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in named:
        if not parameter.requires_grad:  # frozen by the family or under an adapter
            continue
        rule = next((g for g in config.groups if re.search(g.pattern, name)), None)
        lr, decay = config.lr, config.weight_decay
        if rule is not None:
            used.add(rule.pattern)
            if rule.frozen:
                parameter.requires_grad_(False)
                continue
            lr = config.lr if rule.lr is None else rule.lr
            decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        if parameter.ndim < 2:
            decay = 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    for rule in config.groups:
        if rule.pattern not in used:
            raise UserError(f"optim.groups: the pattern {rule.pattern!r} matches no parameter; mend or remove it")
    return [{"params": p, "lr": lr, "base_lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def factor(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the base learning rate at `step` (from 0): linear warm-up, then the schedule down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Any, share: float) -> None:
    """`optimizer` is torch's or DeepSpeed's: both show `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
