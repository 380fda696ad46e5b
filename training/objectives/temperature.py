"""The temperature: learned between a floor and a ceiling, or a function of the step.

Both give the log(1/temperature) that the loss uses from the model's parameter.
The parameter itself is never written, since ZeRO-3 holds it in parts.
"""

import math
from typing import Any

import torch

from training.config import ObjectiveConfig


def bounded(log_scale: torch.Tensor, floor: float, ceiling: float) -> torch.Tensor:
    """log(1/temperature) [1], held within the bounds; outside them, only gradients that lead back pass."""
    low, high = -math.log(ceiling), -math.log(floor)
    held = log_scale + (log_scale.clamp(low, high) - log_scale).detach()
    if held.requires_grad:
        above, below = log_scale.detach() > high, log_scale.detach() < low

        def lead_back(g: torch.Tensor) -> torch.Tensor:
            g = torch.where(above, g.clamp(min=0.0), g)  # descent lowers what has a positive gradient
            return torch.where(below, g.clamp(max=0.0), g)

        held.register_hook(lead_back)
    return held


def scheduled(config: ObjectiveConfig, begin: Any, step: int, steps: int) -> Any:
    """The temperature at a step: from `begin` (a number or a tensor) at the first of `steps` to `temperature_end`."""
    if (end := config.temperature_end) is None:  # constant
        return begin
    share = step / max(steps - 1, 1)
    if config.temperature_schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return begin + (end - begin) * share


def log_scale_at(log_scale: torch.Tensor, config: ObjectiveConfig, step: int, steps: int) -> torch.Tensor:
    """What the loss uses [1]: the parameter within its bounds, or the schedule's value, which passes gradients of 0.

    With gradients of 0 the parameter stays what it was at the first step, where a schedule without a `temperature`
    begins: a pretrained CLIP's own.
    """
    if config.temperature_schedule == "learned":
        return bounded(log_scale, config.temperature_floor, config.temperature_ceiling)
    own = torch.exp(-log_scale.detach().double())
    begin = own if config.temperature is None else torch.full_like(own, config.temperature)
    return 0.0 * log_scale - torch.log(scheduled(config, begin, step, steps)).to(log_scale.dtype)
