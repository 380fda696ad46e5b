"""SigLIP's pairwise sigmoid loss over all ranks in closed form: each pair by itself, one sweep, three products.

With z = +1 for positives and -1 for all other pairs, a pair costs
-log sigmoid(z * s), whose derivative in s is -z * sigmoid(-z * s). Nothing has to
be known of a row before its gradient, so S is computed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from training.distributed import World
from training.objectives.coupled import CoupledGradient, Rows
from training.objectives.tiles import Pairs, Tensors, Tile, Tiling


@dataclass(frozen=True, kw_only=True)
class SigLIP(Tiling):
    """Sum over pairs of -log sigmoid(z * (scale * left . right + bias)), over the rows that count (arXiv 2303.15343).

    Hard negatives are pairs with z = -1 for every row. The paper begins with log_scale = ln 10 and logit_bias = -10.
    """

    @torch.no_grad()
    def __call__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        rows: Rows,
        world: World,
    ) -> CoupledGradient:
        """See `coupled`; scalars: log_scale, the natural logarithm of the inverse temperature, and logit_bias."""
        pairs = Pairs(left, right, rows, world, self)
        scale, bias = float(scalars["log_scale"].exp()), float(scalars["logit_bias"])
        weight = 1.0 / max(pairs.total, 1)
        d_left = torch.zeros_like(pairs.left)
        loss, d_bias = (pairs.left.new_zeros(()) for _ in range(2))

        def negate_positives(tile: Tile, x: torch.Tensor) -> None:
            if tile.targets is not None:
                x.copy_(torch.where(tile.targets, -x, x))
            else:
                tile.own(x).neg_()

        def add(tile: Tile, _: Tensors, sums: Tensors) -> None:
            s = tile.logits(scale, pairs.buffer).add_(bias)
            negate_positives(tile, s)  # -z * s
            loss.sub_(tile.drop_(F.logsigmoid(-s)).sum())
            g = tile.drop_(s.sigmoid_())
            negate_positives(tile, g)
            d_bias.add_(g.sum())
            d_left[tile.rows].addmm_(g, tile.right, alpha=scale * weight)
            sums[tile.side][tile.columns].addmm_(g.T, tile.left, alpha=scale * weight)

        d_right = pairs.joined(pairs.sweep(add, pairs.zeros(), {}))
        parts = torch.stack([loss * weight, pairs.with_left(d_left), d_bias * weight])
        value, d_log_scale, d_bias = world.sum(parts)
        gradients = {"log_scale": d_log_scale.reshape(1), "logit_bias": d_bias.reshape(1)}
        return CoupledGradient(value, d_left, d_right, gradients)
