"""What a coupled loss learns beside the embeddings: a temperature, and SigLIP's bias.

They are parameters of the family's own module, of shape [1]: ZeRO-3 cannot
partition a parameter without dimensions, and gathers for a module's forward
pass what belongs to that very module.
"""

import math

import torch
from torch import nn

from training.config import ObjectiveConfig


def add_scalars(model: nn.Module, objective: ObjectiveConfig) -> tuple[str, ...]:
    """Register the scalars that the objective learns; their names."""
    start = {"log_scale": -math.log(objective.temperature)}
    if objective.coupled == "siglip":
        start["logit_bias"] = objective.logit_bias
    for name, value in start.items():
        model.register_parameter(name, nn.Parameter(torch.tensor([value])))
    return tuple(start)


def read_scalars(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: [1]}, fp32, as computed values: ZeRO-3's hooks follow those, and not parameters that are handed out."""
    return {name: 1.0 * getattr(model, name).float() for name in model.scalars}  # type: ignore[union-attr]
