"""The order of one source: position -> sample, as a function of (seed, epoch) alone, in O(1).

Parts (shards) are permuted, cut into windows of K, and samples are permuted
inside their window: a step touches few shards, and what the next window needs
can be fetched while this one is read.
"""

from functools import lru_cache

import numpy as np

from curation.hashing import hash64


class Order:
    """position -> (epoch, part, index in the part); epochs follow on without a gap. Threads may share one."""

    def __init__(self, sizes: np.ndarray, seed: int, window: int) -> None:
        """sizes int64 [parts]: samples of each part · window: parts that are mixed with each other."""
        self.sizes, self.seed, self.window = sizes, seed, window
        self.total = int(sizes.sum())
        self._plan = lru_cache(4)(self._planned)
        self._mixed = lru_cache(4)(self._permuted)

    def __call__(self, position: int) -> tuple[int, int, int]:
        epoch, at = divmod(position, self.total)
        number = self._number(epoch, at)
        members, ends, drawn, start = self._mixed(epoch, number)
        sample = int(drawn[at - start])
        which = int(np.searchsorted(ends, sample, side="right"))
        return epoch, int(members[which]), sample - int(ends[which] - self.sizes[members[which]])

    def ahead(self, position: int) -> tuple[int, ...]:
        """The parts that are read from this position on: of its window, then of the next."""
        epoch, at = divmod(position, self.total)
        number = self._number(epoch, at)
        last = (number + 1) * self.window >= len(self.sizes)
        following = (epoch + 1, 0) if last else (epoch, number + 1)
        parts = [part for e, n in ((epoch, number), following) for part in self._mixed(e, n)[0].tolist()]
        return tuple(dict.fromkeys(parts))

    def _number(self, epoch: int, at: int) -> int:
        """The window that holds sample `at` of the epoch."""
        return (int(np.searchsorted(self._plan(epoch)[1], at, side="right")) - 1) // self.window

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(parts in the order of this epoch, samples before each of them and in all)"""
        parts = np.random.default_rng(hash64(self.seed, "shards", epoch)).permutation(len(self.sizes))
        return parts, np.concatenate([[0], np.cumsum(self.sizes[parts])])

    def _permuted(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """A window: (its parts, the ends of each within it, its samples in their order, samples before it)"""
        parts, starts = self._plan(epoch)
        members = parts[number * self.window : (number + 1) * self.window]
        ends = np.cumsum(self.sizes[members])
        rng = np.random.default_rng(hash64(self.seed, "window", epoch, number))
        return members, ends, rng.permutation(int(ends[-1])), int(starts[number * self.window])
