"""What a coupled loss takes and gives: one call a step, everything global.

    coupled(left, right, scalars, rows, world) -> CoupledGradient

left [b, D] and right [b, m, D] are this rank's embeddings: right[i, 0] belongs
to left[i], right[i, 1:] are the hard negatives of row i. scalars {name: [1]}
are what the loss learns beside them. b and m are the same on all ranks; what a
rank lacks is a hole. A loss is a frozen dataclass with that call, one file
here, and one line in `COUPLED`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from training.distributed import World


@dataclass(frozen=True, slots=True)
class Rows:
    """What counts of this rank's rows.

    valid: rows that count, bool [b]; the others are holes without weight on either side.
    right_valid: right sides that are there, bool [b, m]. A row without its positive (index 0) is a hole;
        the hard negatives of a hole do not count either.
    groups: what a row shows, int64 [b]: equal numbers, on whichever rank, are the same thing.
    """

    valid: torch.Tensor
    right_valid: torch.Tensor
    groups: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CoupledGradient:
    """A coupled loss over the global batch and its gradients, fp32 (fp64 for fp64 embeddings).

    value: global loss [] · left [b, D], right [b, m, D]: gradients of this rank's embeddings ·
    scalars: global gradients [1], the same on every rank.
    """

    value: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    scalars: dict[str, torch.Tensor]


Coupled = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], Rows, World], CoupledGradient]
