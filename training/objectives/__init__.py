"""Coupled losses by name. Separable sums are the models' own: they need no coupling."""

import dataclasses
from typing import Any

from training.config import ObjectiveConfig
from training.objectives.coupled import Coupled
from training.objectives.infonce import InfoNCE
from training.objectives.siglip import SigLIP

COUPLED: dict[str, Any] = {"infonce": InfoNCE, "siglip": SigLIP}


def build(config: ObjectiveConfig) -> Coupled:
    """The recipe's coupled loss: its fields are those of the section that the loss knows."""
    kind = COUPLED[config.coupled]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(config).items() if name in known})
