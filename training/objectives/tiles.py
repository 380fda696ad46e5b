"""Pairs of the global batch, a tile at a time: what InfoNCE and SigLIP share.

S = scale * left @ right^T exists one tile of rows and columns at a time, small
enough that its exponentials and sums are taken where the product left it, in
the cache. A tile knows which of its pairs are positives and which do not count:

- a row's own positive is a positive; so is, with `duplicates="positive"`, the
  positive of every row of the same group (SupCon, UniCL);
- with `duplicates="masked"` the positives of other rows of the same group are
  neither (no false negatives); with "negative" they are negatives like any;
- hard negatives are columns for the rows of all ranks, as in VLM2Vec, Tevatron
  and sentence-transformers, and always negatives: groups say what a row's two
  sides show, not what was found to be near them;
- pairs of a hole do not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from training.distributed import World
from training.objectives.columns import Tensors, columns_of
from training.objectives.coupled import Rows

Duplicates = Literal["negative", "masked", "positive"]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What a coupled loss may be told beside its own settings.

    duplicates: what pairs of equal groups are (without groups, each row is its own) ·
    gather: "all" holds every right side, "ring" passes them round ·
    tile: rows and columns of S that exist at once: 1 MiB, which stays in a core's cache (GPUs are quicker with more) ·
    keep: entries of S kept between the two sweeps of InfoNCE instead of computed again.
    """

    duplicates: Duplicates = "negative"
    gather: Literal["all", "ring"] = "all"
    tile: int = 512
    keep: int = 5 * 2**22


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of pairs [t, u]. side: "positive" or "negative" (the hard ones), as the tensors of its columns are named.

    diagonal: of own positives, bounds in rows and in columns; empty where the tile has none.
    targets: bool [t, u] of positives beside or instead of the diagonal · dropped: what does not count, broadcast.
    """

    key: tuple[int, str, int, int]
    side: str
    rows: slice
    columns: slice
    left: torch.Tensor  # [t, D]
    right: torch.Tensor  # [u, D]
    diagonal: tuple[slice, slice]
    targets: torch.Tensor | None
    dropped: tuple[torch.Tensor, ...]

    def logits(self, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """scale * left @ right^T, in the flat buffer `out` if there is one."""
        t, u = len(self.left), len(self.right)
        s = self.left.new_empty(t, u) if out is None else out[: t * u].view(t, u)
        return torch.addmm(s, self.left, self.right.T, beta=0, alpha=scale, out=s)

    def drop_(self, x: torch.Tensor) -> torch.Tensor:
        """0 for pairs that do not count."""
        for mask in self.dropped:
            x.masked_fill_(mask, 0)
        return x

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The pairs of a row and its own positive, a view."""
        return x[self.diagonal].diagonal()


class Pairs:
    """This rank's rows against the columns of all ranks.

    left [b, D] in the dtype that is computed in: fp32, or fp64 as given · valid: rows that count, bool [b] ·
    total: rows that count on all ranks · widest: columns, on all ranks.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, rows: Rows, world: World, tiling: Tiling) -> None:
        b, m, _ = right.shape
        self.world, self.tiling, self.shape = world, tiling, right.shape
        self.left = left if left.dtype == torch.float64 else left.float()
        self.valid = rows.valid & rows.right_valid[:, 0]
        negative_valid = (self.valid[:, None] & rows.right_valid[:, 1:]).flatten()
        fixed = {"positive": right[:, 0], "positive_valid": self.valid.byte()}
        if m > 1:
            fixed |= {"negative": right[:, 1:].flatten(0, 1), "negative_valid": negative_valid.byte()}
        self.groups = rows.groups if tiling.duplicates != "negative" else None
        if self.groups is not None:
            fixed["groups"] = self.groups
        self.columns = columns_of(fixed, world, tiling.gather)
        counted = world.sum(torch.stack([self.valid.sum(), negative_valid.sum()])).tolist()
        self.total, self.widest = int(counted[0]), world.size * b * m
        self.holes = sum(counted) < self.widest
        self.buffer = self.left.new_empty(min(tiling.tile, b) * min(tiling.tile, world.size * b * m))

    def zeros(self) -> Tensors:
        """A place for the gradient of this rank's right sides."""
        b, m, d = self.shape
        out = {"positive": self.left.new_zeros(b, d)}
        return out | ({"negative": self.left.new_zeros(b * (m - 1), d)} if m > 1 else {})

    def with_left(self, d_left: torch.Tensor) -> torch.Tensor:
        """<L, dL> []: the gradient of log(scale), as S is linear in either. A tile at a time, for its memory."""
        parts = [(self.left[rows] * d_left[rows]).sum() for rows in spans(len(d_left), self.tiling.tile)]
        return torch.stack(parts).sum()

    def joined(self, sums: Tensors) -> torch.Tensor:
        """The right sides [b, m, D] of what `zeros` began."""
        b, m, d = self.shape
        positive = sums["positive"][:, None]
        return torch.cat([positive, sums["negative"].view(b, m - 1, d)], 1) if m > 1 else positive

    def sweep(self, work: Callable[[Tile, Tensors, Tensors], None], sums: Tensors, more: Tensors) -> Tensors:
        """`work(tile, tensors of its columns, sums)` for every tile; see `Columns.sweep`."""

        def block(owner: int, fixed: Tensors, sums: Tensors) -> None:
            for tile in self._tiles(owner, fixed):
                work(tile, fixed, sums)

        return self.columns.sweep(block, sums, more)

    def _tiles(self, owner: int, fixed: Tensors) -> Iterator[Tile]:
        b = self.shape[0]
        ahead = (self.world.rank - owner) * b  # columns of the block before the own positive of row 0
        for side in ("positive", "negative"):
            if side not in fixed:
                continue
            for columns in spans(len(fixed[side]), self.tiling.tile):
                right = fixed[side][columns].to(self.left.dtype)
                for rows in spans(b, self.tiling.tile):
                    first = max(rows.start + ahead, columns.start)
                    last = max(min(rows.stop + ahead, columns.stop), first) if side == "positive" else first
                    diagonal = (
                        slice(first - ahead - rows.start, last - ahead - rows.start),
                        slice(first - columns.start, last - columns.start),
                    )
                    targets, dropped = self._masks(side, fixed, rows, columns, diagonal)
                    key = (owner, side, columns.start, rows.start)
                    yield Tile(key, side, rows, columns, self.left[rows], right, diagonal, targets, dropped)

    def _masks(
        self, side: str, fixed: Tensors, rows: slice, columns: slice, diagonal: tuple[slice, slice]
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """(positives by group, what does not count)."""
        holes: tuple[torch.Tensor, ...] = ()
        there = fixed[f"{side}_valid"][columns].bool()
        if self.holes:
            holes = (~self.valid[rows, None], ~there)
        if self.groups is None or side == "negative":
            return None, holes
        same = self.groups[rows, None] == fixed["groups"][columns]  # [t, u]
        if self.tiling.duplicates == "masked":
            same[diagonal].diagonal().fill_(False)
            return None, (*holes, same)
        return same.logical_and_(self.valid[rows, None]).logical_and_(there), holes


def spans(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]
