"""Dropout that falls alike on inputs which run alone, and on the same inputs with others stacked upon them.

The first pass of a step runs what is embedded alone. In the second MM-GEM stacks
the captions to be written on it, and FLAVA the masked inputs, so that ZeRO-3
gathers each layer once. From one random state torch draws other masks for
another shape. Here the first pass draws for the shape of the second and takes
its corner: the state then also moves on alike from layer to layer.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from curation.errors import UserError


@dataclass(frozen=True, slots=True)
class _Stack:
    rows: int
    more: int
    longer: int


class Dropout(nn.Dropout):
    """`nn.Dropout`, in the place of peft's; inside `stacked` with the masks of a larger input."""

    within: _Stack | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] or [B, ...]

        Raises:
            UserError: inside `stacked`, an input that has no row for each of the chunk's.
        """
        if not (self.training and self.p):
            return input
        shape, stack = list(input.shape), Dropout.within
        if stack is not None:
            if shape[0] != stack.rows:
                raise UserError(
                    f"adapter.dropout: a layer sees {shape[0]} rows of {stack.rows}, so its masks cannot be drawn "
                    "alike in both passes of a step; narrow adapter.target_modules, or set it to 0"
                )
            shape[0] += stack.more
            if stack.longer:
                shape[1] += stack.longer
        kept = torch.empty(shape, dtype=torch.bool, device=input.device).bernoulli_(1 - self.p)
        kept = kept[tuple(slice(0, size) for size in input.shape)]
        return input.masked_fill(~kept, 0.0) / (1 - self.p)


@contextlib.contextmanager
def stacked(rows: int, more: int, longer: int = 0) -> Iterator[None]:
    """Inside, inputs [rows, T, ...] get the masks that they have as the corner of [rows + more, T + longer, ...]."""
    Dropout.within = _Stack(rows, more, longer)
    try:
        yield
    finally:
        Dropout.within = None


def put_in(module: nn.Module) -> None:
    """Replace the dropout that peft keeps beside each layer it adapts, in a ModuleDict by adapter."""
    for kept in list(module.modules()):
        if isinstance(kept, nn.ModuleDict):
            for name, layer in kept.items():
                if type(layer) is nn.Dropout:
                    kept[name] = Dropout(layer.p)
