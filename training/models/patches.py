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
    """In the place of a ViT's own dropout after the positional embedding: rows of [B, P + N, D] by number.

    Outside `only`, and so when a model is graded, every patch is kept.

    Args:
        prefix: P tokens before the patches (class token, registers), which stay.
    """

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.kept: torch.Tensor | None = None  # int64 [B, keep] of 0 .. N - 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, P + N, D] -> [B, P + keep, D]"""
        if self.kept is None:
            return tokens
        rows = self.prefix + self.kept[..., None].expand(-1, -1, tokens.shape[-1])
        return torch.cat([tokens[:, : self.prefix], tokens.gather(1, rows)], 1)


def take_over(visual: Any, dropped: float) -> None:
    """Put the loader's patches in the place of the tower's own dropout. What pools after it (a class token, a mean,
    attention) pools over the kept ones.

    Args:
        visual: an open_clip tower: its own ViT, or one of timm's, as SigLIP's are.

    Raises:
        UserError: patches are to be dropped by a tower that is neither.
    """
    from timm.models.vision_transformer import VisionTransformer

    trunk = getattr(visual, "trunk", None)
    if hasattr(visual, "patch_dropout"):
        visual.patch_dropout = KeptPatches()
    elif isinstance(trunk, VisionTransformer):
        trunk.patch_drop = KeptPatches(trunk.num_prefix_tokens)  # type: ignore[assignment]
    elif dropped:
        kind = type(visual if trunk is None else trunk).__name__
        raise UserError(f"patch_dropout: {kind} is no ViT of open_clip's or timm's, which alone can drop patches")


def grid_of(visual: Any) -> tuple[int, ...]:
    """(rows, columns) of a ViT's patches; () of another tower."""
    timms = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    return tuple(getattr(visual, "grid_size", None) or getattr(timms, "grid_size", None) or ())


@contextlib.contextmanager
def only(visual: Any, kept: torch.Tensor | None) -> Iterator[None]:
    """Inside, the tower sees these patches (int64 [B, keep]) alone; all of them where `kept` is None."""
    if kept is None:
        yield
        return
    place = next(module for module in visual.modules() if isinstance(module, KeptPatches))
    place.kept = kept
    try:
        yield
    finally:
        place.kept = None
