"""InfoNCE over all ranks in closed form: one exponential a pair, one side gathered, four products.

With E = exp(S - shift), the softmax of row i is E[i] / its row sum and that of
column j is E[:, j] / its column sum, so

    G = E * (w / row sums + w / column sums) - 2 w * positives

serves both directions with one exponential; dL = scale * G @ R is this rank's,
scale * G^T @ L is summed over ranks, and <L, dL> is the gradient of log(scale).
One sweep over S takes the sums, a second the gradient; what `keep` has room
for is not computed twice.

Stability. Logits of unit embeddings lie within +-scale. One shift for all of
them keeps every sum finite in fp32, and every row and column whose sum did not
sink to where fp32 loses terms is exact to rounding: all of them, at scale 100,
unless some row fits nothing. If one did sink, on any rank, both sweeps are
taken with exponentials in fp64, which holds e^+-700: slower, same code.

E is computed as a power of two, of logits counted in bits (S / ln 2, a factor
of the product): a third of the time of exp on CPUs, to the same rounding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from training.distributed import World
from training.objectives.coupled import CoupledGradient, Rows
from training.objectives.tiles import Pairs, Tensors, Tile, Tiling

LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class InfoNCE(Tiling):
    """Softmax cross-entropy of each row over all columns, and of each positive column over all rows.

    Each direction is a mean over the rows that count of the global batch, and for a row of several positives the
    mean of their log-probabilities, all of them in the denominator (SupCon's L_out, arXiv 2004.11362 eq. 2; UniCL,
    arXiv 2204.03610). Hard negatives stand in the denominator of every row; they have no row of their own, so
    right -> left has none.

    Args:
        directions: "both" (van den Oord 2018; CLIP) or "left_to_right" alone (VLM2Vec, arXiv 2410.05160).
        reduction: "sum" adds two directions (MM-GEM, arXiv 2405.19333), "mean" halves that (CLIP).
    """

    directions: Literal["both", "left_to_right"] = "both"
    reduction: Literal["sum", "mean"] = "mean"

    @torch.no_grad()
    def __call__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        rows: Rows,
        world: World,
    ) -> CoupledGradient:
        """See `coupled`; scalars: log_scale, the natural logarithm of the inverse temperature."""
        pairs = Pairs(left, right, rows, world, self)
        both = self.directions == "both"
        weight = (0.5 if both and self.reduction == "mean" else 1.0) / max(pairs.total, 1)
        sweep = _Sweeps(pairs, float(scalars["log_scale"].exp()), both)
        if not sweep.fits() and pairs.left.dtype != torch.float64:
            sweep = _Sweeps(pairs, sweep.scale, both, torch.float64)

        valid, each = pairs.valid, weight * (1 + both)  # of a row in the loss, directions together
        d_left, d_right = sweep.gradient(weight)
        target = torch.where(valid, sweep.target_bits / sweep.targets, 0.0)
        bits = torch.where(valid, sweep.row_sum.log2() + sweep.shift, 0.0)
        if both:
            bits += torch.where(valid, sweep.column_sum.log2() + sweep.shift, 0.0)
        value = (bits.sum() * weight - target.sum() * each) * LN2
        value, d_log_scale = world.sum(torch.stack([value.to(d_left.dtype), pairs.with_left(d_left)]))
        return CoupledGradient(value, d_left, d_right, {"log_scale": d_log_scale.reshape(1)})


class _Sweeps:
    """The first sweep's sums, with exponentials in `dtype`, and the second sweep."""

    def __init__(self, pairs: Pairs, scale: float, both: bool, dtype: torch.dtype | None = None) -> None:
        self.pairs, self.scale, self.both = pairs, scale, both
        self.dtype = dtype or pairs.left.dtype
        self.shift = max(0.0, scale / LN2 + math.log2(pairs.widest) - math.log2(torch.finfo(self.dtype).max) + 1)
        self.kept: dict[tuple[int, str, int, int], torch.Tensor] = {}
        self.room = pairs.tiling.keep
        b = len(pairs.left)
        self.row_sum, self.target_bits, self.targets = (
            pairs.left.new_zeros(b, dtype=t) for t in (self.dtype, pairs.left.dtype, pairs.left.dtype)
        )
        columns = {"sum": pairs.left.new_zeros(b, dtype=self.dtype)} if both else {}
        self.column_sum = pairs.sweep(self._add, columns, {}).get("sum", self.row_sum)

    def _exponentials(self, tile: Tile, s: torch.Tensor) -> torch.Tensor:
        s = s.to(self.dtype)
        return tile.drop_((s.sub_(self.shift) if self.shift else s).exp2_())

    def _add(self, tile: Tile, _: Tensors, sums: Tensors) -> None:
        size = len(tile.left) * len(tile.right)
        keeps = size <= self.room
        s = tile.logits(self.scale / LN2, None if keeps else self.pairs.buffer)  # [t, u]
        if tile.targets is not None:
            self.target_bits[tile.rows] += torch.where(tile.targets, s, 0.0).sum(1)
            self.targets[tile.rows] += tile.targets.sum(1)
        else:
            own = self.target_bits[tile.rows][tile.diagonal[0]]
            own += tile.own(s)
            self.targets[tile.rows][tile.diagonal[0]] += 1.0
        e = self._exponentials(tile, s)
        self.row_sum[tile.rows] += e.sum(1)
        if self.both and tile.side == "positive":
            sums["sum"][tile.columns] += e.sum(0)
        if keeps:
            self.kept[tile.key] = e
            self.room -= size

    def fits(self) -> bool:
        """Whether no sum, of any rank, sank to where terms are lost (or is no number)."""
        info = torch.finfo(self.dtype)
        sums = torch.stack([self.row_sum, self.column_sum])
        lost = (sums < info.tiny / info.eps**2) | ~sums.isfinite()
        return not self.pairs.world.any(bool((lost & self.pairs.valid).any()))

    def gradient(self, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(dL [b, D], dR [b, m, D]), each softmax and each direction's positives weighted by `weight`."""
        pairs, scale = self.pairs, self.scale
        d_left = torch.zeros_like(pairs.left)
        row = torch.where(pairs.valid, weight / self.row_sum, 0.0)  # [b]
        column = torch.where(pairs.valid, weight / self.column_sum, 0.0)
        target = torch.where(pairs.valid, -weight * (1 + self.both) / self.targets, 0.0)
        factors = torch.empty_like(pairs.buffer, dtype=self.dtype) if self.both else None

        def add(tile: Tile, fixed: Tensors, sums: Tensors) -> None:
            e = self.kept.pop(tile.key, None)
            if e is None:
                e = self._exponentials(tile, tile.logits(scale / LN2, pairs.buffer))
            if factors is not None and tile.side == "positive":
                out = factors[: e.numel()].view(e.shape)
                g = e.mul_(torch.add(row[tile.rows, None], fixed["column"][tile.columns], out=out))
            else:
                g = e.mul_(row[tile.rows, None])
            if tile.targets is not None:
                g.addcmul_(tile.targets.to(g.dtype), target[tile.rows, None].to(g.dtype))
            else:
                tile.own(g).add_(target[tile.rows][tile.diagonal[0]])
            g = g.to(pairs.left.dtype)
            d_left[tile.rows].addmm_(g, tile.right, alpha=scale)
            sums[tile.side][tile.columns].addmm_(g.T, tile.left, alpha=scale)

        sums = pairs.sweep(add, pairs.zeros(), {"column": column} if self.both else {})
        return d_left, pairs.joined(sums)
