"""Symmetric InfoNCE over all ranks, with its gradient in closed form and half of the usual work.

With S = scale * L @ R^T over the global batch, the loss needs the log-sum-exp
of every row and of every column. A rank that holds its own rows of L and all
of R completes its rows alone; its columns are partial, and one (max, sum)
reduction of B floats completes them. Then

    G = w * (softmax over rows + softmax over columns - 2 * identity)

gives dL = scale * G @ R for the local rows, a partial dR = scale * G^T @ L for
one reduce-scatter, and <L, dL> for log(scale). So only one side is gathered, no
autograd graph is held, and S exists one tile of rows at a time.

Where every tile was kept from the first pass (the local part of S fits in one
tile) it is not computed again: three products instead of four.
"""

from dataclasses import dataclass

import torch

from training.distributed import World


@dataclass(frozen=True, slots=True)
class CoupledGradient:
    """A coupled loss over the global batch and its gradients.

    value: global loss [] · left, right: gradients of the local rows [b, D] ·
    log_scale: global gradient [] (the same on every rank).
    """

    value: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    log_scale: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """L_left->right + L_right->left, each a mean over the global batch (van den Oord 2018; Radford 2021).

    Args:
        reduction: "sum" adds the two directions (MM-GEM, arXiv 2405.19333), "mean" halves that (CLIP).
        tile: rows of S that exist at once.
    """

    reduction: str = "mean"
    tile: int = 1024

    def __call__(
        self, left: torch.Tensor, right: torch.Tensor, log_scale: torch.Tensor, valid: torch.Tensor, world: World
    ) -> CoupledGradient:
        """
        Args:
            left, right: unit rows of this rank, paired by position [b, D]; b is the same on all ranks.
            log_scale: natural logarithm of the inverse temperature, [] or [1].
            valid: rows that count, bool [b]; the others are holes without weight on either side.
        """
        b = left.shape[0]
        scale = log_scale.detach().exp().reshape(()).to(left.dtype)
        all_right = world.gather(right)  # [B, D]
        all_valid = world.gather(valid.to(left.dtype)) > 0  # [B]
        total = int(all_valid.sum())
        holes = total < all_valid.numel()
        first = world.rank * b  # the column of this rank's first row

        def logits(rows: slice) -> torch.Tensor:
            s = (left[rows] @ all_right.T).mul_(scale)  # [t, B]
            return s.masked_fill_(~all_valid, -torch.inf) if holes else s

        tiles = [slice(i, min(i + self.tile, b)) for i in range(0, b, self.tile)]
        kept = logits(tiles[0]) if len(tiles) == 1 else None
        row_lse = left.new_empty(b)
        column_max = left.new_full((all_right.shape[0],), -torch.inf)
        column_sum = torch.zeros_like(column_max)
        for rows in tiles:
            s = logits(rows) if kept is None else kept
            row_lse[rows] = s.logsumexp(1)
            if holes:
                s = s.masked_fill(~valid[rows, None], -torch.inf)
            top = torch.maximum(column_max, s.amax(0)).clamp_(min=torch.finfo(s.dtype).min)
            column_sum.mul_((column_max - top).exp_()).add_((s - top).exp_().sum(0))
            column_max = top
        top = world.max(column_max.clone())
        column_lse = world.sum(column_sum.mul_((column_max - top).exp_())).log_() + top  # [B]

        weight = (0.5 if self.reduction == "mean" else 1.0) / max(total, 1)
        d_left, d_right = torch.empty_like(left), torch.zeros_like(all_right)
        diagonal_sum = left.new_zeros(())
        for rows in tiles:
            s = logits(rows) if kept is None else kept  # [t, B]
            own = torch.arange(rows.start, rows.stop, device=s.device)
            diagonal = s[own - rows.start, first + own]
            diagonal_sum += torch.where(valid[rows], diagonal, 0.0).sum()
            g = (s - row_lse[rows, None]).exp_().add_((s - column_lse).exp_())  # [t, B]
            g[own - rows.start, first + own] -= 2.0
            if holes:
                g.masked_fill_(~(valid[rows, None] & all_valid), 0.0)
            g.mul_(weight)
            d_left[rows] = (g @ all_right).mul_(scale)
            d_right.addmm_(g.T, left[rows])
        d_right = world.scatter_sum(d_right.mul_(scale))

        lse_sum = torch.where(valid, row_lse + column_lse[first : first + b], 0.0).sum() - 2 * diagonal_sum
        # The gradient of log(scale) is the sum of G * S; as S = scale * L @ R^T, that is <L, scale * G @ R>.
        value, d_log_scale = world.sum(torch.stack([lse_sum * weight, (left * d_left).sum()]))
        return CoupledGradient(value, d_left, d_right, d_log_scale)
