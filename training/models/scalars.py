"""What a coupled loss learns beside the embeddings: a temperature, and SigLIP's bias.

They are parameters of the family's own module, of shape [1]: ZeRO-3 cannot
partition a parameter without dimensions, and gathers for a module's forward
pass what belongs to that very module.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from training.config import ObjectiveConfig

START = {"infonce": {"log_scale": -math.log(0.07)}, "siglip": {"log_scale": math.log(10.0), "logit_bias": -10.0}}
"""CLIP's and SigLIP's (arXiv 2303.15343, section 3.2), by the coupled loss."""


def _said(objective: ObjectiveConfig) -> dict[str, float | None]:
    """{scalar that the objective learns: where the recipe has it begin, or None}."""
    said = {"log_scale": None if objective.temperature is None else -math.log(objective.temperature)}
    return said | ({"logit_bias": objective.logit_bias} if objective.coupled == "siglip" else {})


def unsaid(objective: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A pretrained model's state without the scalars whose beginning the recipe names."""
    named = {name for name, value in _said(ObjectiveConfig(**objective)).items() if value is not None}
    return {name: tensor for name, tensor in state.items() if name not in named}


def add_scalars(
    model: nn.Module, objective: ObjectiveConfig, own: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """Register the scalars that the objective learns; their names.

    own: where a pretrained model's ended, or its architecture's begin; what the recipe says comes before.
    """
    for name, value in (said := _said(objective)).items():
        start = {**START[objective.coupled], **(own or {})}[name] if value is None else value
        model.register_parameter(name, nn.Parameter(torch.tensor([float(start)])))
    return tuple(said)


def read_scalars(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: [1]}, fp32, as computed values: ZeRO-3's hooks follow those, and not parameters that are handed out."""
    return {name: 1.0 * getattr(model, name).float() for name in model.scalars}  # type: ignore[union-attr]
