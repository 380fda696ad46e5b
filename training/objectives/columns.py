"""How the local rows meet the right sides of every rank: all gathered, or passed round in a ring.

A sweep shows each right side to this rank once and lets it add to sums that
belong to that side (its log-sum-exp, its gradient); afterwards every rank holds
the complete sums of its own right sides.

- `Gathered` holds all W * b of them: one all-gather for all sweeps, one
  reduce-scatter for a sweep's sums. The left sides never travel.
- `Ring` holds two blocks of b, whatever W is: the one at work, and the next,
  which is on its way meanwhile. The sums travel with their block and are
  complete when it is home. That is W sends of the sums and W - 1 of the block
  a sweep, where gathering moves the block once for all sweeps: for batches
  whose right sides would not fit.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from training.distributed import World

Tensors = dict[str, torch.Tensor]
Work = Callable[[int, Tensors, Tensors], None]
"""(rank whose columns come first, the columns' tensors, the sums to add to in place)"""


class Columns(Protocol):
    """Right sides of all ranks; tensors are given by name, one entry in the first dimension a column."""

    def sweep(self, work: Work, sums: Tensors, more: Tensors) -> Tensors:
        """Run `work` on all columns; the complete sums of this rank's own, which begin at `sums`' zeros.

        more: tensors of this rank's columns that only this sweep needs.
        """
        ...


class Gathered:
    def __init__(self, fixed: Tensors, world: World) -> None:
        self.world = world
        self.fixed = {name: world.gather(x) for name, x in fixed.items()}

    def sweep(self, work: Work, sums: Tensors, more: Tensors) -> Tensors:
        fixed = self.fixed | {name: self.world.gather(x) for name, x in more.items()}
        if self.world.size > 1:
            sums = {name: x.new_zeros(self.world.size * len(x), *x.shape[1:]) for name, x in sums.items()}
        work(0, fixed, sums)
        return {name: self.world.scatter_sum(x) for name, x in sums.items()}


class Ring:
    def __init__(self, fixed: Tensors, world: World) -> None:
        self.fixed, self.world = {name: x.contiguous() for name, x in fixed.items()}, world

    def sweep(self, work: Work, sums: Tensors, more: Tensors) -> Tensors:
        size, block = self.world.size, self.fixed | more
        for turn in range(size):
            coming, wait = self.world.pass_on(block, 0) if turn + 1 < size else ({}, lambda: None)
            work((self.world.rank - turn) % size, block, sums)
            wait()
            arrived, wait = self.world.pass_on(sums, len(block))
            wait()
            block, sums = coming, arrived
        return sums


def columns_of(fixed: Tensors, world: World, gather: str) -> Columns:
    """`gather`: "all" or "ring"; one rank has nothing to pass."""
    return Ring(fixed, world) if gather == "ring" and world.size > 1 else Gathered(fixed, world)
