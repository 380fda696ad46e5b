"""Several sources in one run: which source a position belongs to, and which position of that source it is.

The run's positions are cut into units of `unit` samples, and each unit takes
one source. A unit of 1 mixes by sample; 64 gives VLM2Vec-v2's interleaved
sub-batches (arXiv 2507.04590), each from one data set; a whole batch gives
FLAVA's steps of one kind (arXiv 2112.04482).

Units come in blocks, and how many units of each source lie before a block is
known without walking there, so resuming at any position costs nothing:

    shares       every block has exactly the shares of the weights, in an order drawn from (seed, block)
    round_robin  a block is one unit of each source, in their order
    random       every unit draws its source by itself. Counts before a block come from a binary tree over the units,
                 in which each node draws, from (seed, node), how many units of each source its left half has
                 (multivariate hypergeometric): the distribution is just that of independent draws.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Literal

import numpy as np

from curation.errors import UserError
from curation.hashing import hash64

Mixing = Literal["shares", "round_robin", "random"]
LEAF, TOP = 1 << 10, 1 << 29  # units of a random block, and of a tree of them (numpy draws from below 10^9)
LONGEST = 1 << 22  # units of a block of shares
FINEST = 10_000  # weights are taken as fractions with denominators up to this


class Mixture:
    """positions of the run [n] -> (source [n], position in that source [n])."""

    def __init__(self, weights: Mapping[str, float], *, seed: int, unit: int, mixing: Mixing) -> None:
        """weights: of each source by name; they need not add up to 1.

        Raises:
            UserError: weights that no block can hold, or that `round_robin` would not heed.
        """
        self.seed, self.unit, self.mixing = seed, unit, mixing
        if mixing == "round_robin" and (uneven := [name for name, w in weights.items() if w != 1]):
            raise UserError(
                f"loader.sources.{uneven[0]}.weight: {weights[uneven[0]]:g} has no effect under round_robin; "
                "leave it out, or take loader.mixing: shares"
            )
        self.shares = _whole(weights)
        self.length = LEAF if mixing == "random" else int(self.shares.sum())
        self._block = lru_cache(4)(self._drawn)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        units, within = np.divmod(positions, self.unit)
        blocks, places = np.divmod(units, self.length)
        source, own = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources, numbers = self._block(block)
            source[here] = sources[places[here]]
            own[here] = numbers[places[here]] * self.unit + within[here]
        return source, own

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the unit within its source) of every unit of a block, [length] each."""
        before, counts = self._counts(block)
        sources = np.repeat(np.arange(len(counts)), counts)
        if self.mixing != "round_robin" and len(counts) > 1:
            sources = np.random.default_rng(hash64(self.seed, "block", block)).permutation(sources)
        numbers = np.empty(len(sources), np.int64)
        for source, count in enumerate(counts.tolist()):
            numbers[sources == source] = before[source] + np.arange(count)
        return sources, numbers

    def _counts(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Units of each source before the block, and in it: [sources] each."""
        if self.mixing != "random":
            return block * self.shares, self.shares
        tree, at = divmod(block * LEAF, TOP)
        trees = [self._rng("tree", t).multinomial(TOP, self.shares / self.shares.sum()) for t in range(tree + 1)]
        before, counts = sum(trees[:-1], np.zeros_like(self.shares)), trees[-1]
        start, size = 0, TOP
        while size > LEAF:
            size //= 2
            left = self._rng("half", tree, start, size).multivariate_hypergeometric(counts, size, method="marginals")
            if at < start + size:
                counts = left
            else:
                before, counts, start = before + left, counts - left, start + size
        return before, counts

    def _rng(self, *node: str | int) -> np.random.Generator:
        return np.random.default_rng(hash64(self.seed, *node))


def _whole(weights: Mapping[str, float]) -> np.ndarray:
    """The smallest whole numbers in the proportions of the weights: int64 [sources]."""
    parts = {name: Fraction(str(weight)).limit_denominator(FINEST) for name, weight in weights.items()}
    for name, part in parts.items():
        if part <= 0:
            raise UserError(f"loader.sources.{name}.weight: {weights[name]} is too small; weights go down to 0.0001")
    common = lcm(*(part.denominator for part in parts.values()))
    whole = [int(part * common) for part in parts.values()]
    shares = np.array(whole, np.int64) // gcd(*whole)
    if int(shares.sum()) > LONGEST:
        raise UserError(
            f"loader.sources: weights {', '.join(f'{w:g}' for w in weights.values())} take blocks of "
            f"{int(shares.sum())} units, {LONGEST} at most; round them"
        )
    return shares
