"""FLIP (arXiv 2212.00794): a ViT that sees only some of a picture's patches while it trains.

open_clip draws them from torch's generator, which differs by rank and chunk.
Here the loader draws them from (seed, epoch, uid) and they lie in the chunk, so
that both passes of a step, any number of ranks and any chunking see the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from curation.errors import UserError


class KeptPatches(nn.Module):
    """In the place of a ViT's own dropout after the positional embedding: rows of [B, 1 + N, D] by number.

    Outside `only`, and so when a model is graded, every patch is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None  # int64 [B, keep] of 0 .. N - 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, 1 + N, D] -> [B, 1 + keep, D]; the class token stays first."""
        if self.kept is None:
            return tokens
        rows = 1 + self.kept[..., None].expand(-1, -1, tokens.shape[-1])
        return torch.cat([tokens[:, :1], tokens.gather(1, rows)], 1)


def take_over(visual: Any, dropped: float) -> None:
    """Put the loader's patches in the place of the tower's own dropout.

    Raises:
        UserError: patches are to be dropped by a tower that is not open_clip's ViT.
    """
    if hasattr(visual, "patch_dropout"):
        visual.patch_dropout = KeptPatches()
    elif dropped:
        raise UserError(f"patch_dropout: {type(visual).__name__} is no ViT of open_clip, which alone can drop patches")


@contextlib.contextmanager
def only(visual: Any, kept: torch.Tensor | None) -> Iterator[None]:
    """Inside, the tower sees these patches (int64 [B, keep]) and its class token; all where `kept` is None."""
    if kept is None:
        yield
        return
    place = next(module for module in visual.modules() if isinstance(module, KeptPatches))
    place.kept = kept
    try:
        yield
    finally:
        place.kept = None
