"""Coupled losses by name. Separable sums are the models' own: they need no coupling."""

from training.objectives.infonce import InfoNCE

COUPLED = {"infonce": InfoNCE}
