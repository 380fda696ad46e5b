"""A set of values as long as the pool, in files: the values' hashes of 128 bits, sorted, in which any worker looks.

Hashes that long stand for the values themselves: that one of 10^11 samples has
the hash of one of 10^8 other values has a chance of 10^-19. They are cut by
their first bits before they are sorted, so that whoever makes the files holds
one part of them, and they are mapped, so that the workers of a machine share
16 bytes a value.
"""

import hashlib
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from curation.selection.subset import Pairs, places

PARTS = 64  # that a list is cut into; each is sorted at once


@dataclass(frozen=True, kw_only=True)
class Listed:
    """`count` distinct values, by the upper and the lower halves of their hashes in `folder`: uint64 [count] both."""

    folder: Path
    count: int

    def among(self, values: Iterable[bytes]) -> np.ndarray:
        """Which of these are values of the set: bool [n]."""
        asked = _hashes(values)
        found = np.zeros(len(asked), bool)
        if not self.count:
            return found
        high, low = (np.memmap(self.folder / half, np.uint64, "r") for half in ("high", "low"))
        place = np.searchsorted(high, asked[:, 0])
        open_ = np.flatnonzero(place < self.count)
        while len(open_ := open_[high[place[open_]] == asked[open_, 0]]):  # again where upper halves are equal alone
            found[open_] = low[place[open_]] == asked[open_, 1]
            open_ = open_[~found[open_]]
            place[open_] += 1
            open_ = open_[place[open_] < self.count]
        return found


def write_listed(folder: Path, blocks: Iterable[Iterable[bytes]]) -> Listed:
    """The values of all blocks, repeated or not, in a new folder inside this one."""
    folder = folder / f"listed-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    cuts = np.arange(1, PARTS, dtype=np.uint64) * np.uint64(2**64 // PARTS), np.zeros(PARTS - 1, np.uint64)
    count = 0
    with open(folder / "high", "wb") as high, open(folder / "low", "wb") as low:
        for path in sorted_parts(folder, map(_hashes, blocks), cuts):
            hashes = np.fromfile(path, np.uint64).reshape(-1, 2)
            new = np.ones(len(hashes), bool)
            new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
            high.write(hashes[new, 0].tobytes())
            low.write(hashes[new, 1].tobytes())
            count += int(np.count_nonzero(new))
            path.unlink()
    return Listed(folder=folder, count=count)


def sorted_parts(folder: Path, blocks: Iterable[np.ndarray], cuts: Pairs) -> list[Path]:
    """Files in this folder that are, one after the other, all numbers of 128 bits of the blocks in their order.

    Args:
        blocks: the upper and lower halves: uint64 [n, 2].
        cuts: sorted numbers; a file begins with each. What lies between two is in memory at once.
    """
    paths = [folder / f"part-{number}" for number in range(len(cuts[0]) + 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for block in blocks:
            part = places(cuts, (block[:, 0], block[:, 1]), after=True)
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(len(files) + 1)).tolist()
            for file, (start, end) in zip(files, pairwise(ends), strict=True):
                file.write(block[order[start:end]].tobytes())
    for path in paths:
        numbers = np.fromfile(path, np.uint64).reshape(-1, 2)
        numbers[np.lexsort((numbers[:, 1], numbers[:, 0]))].tofile(path)
    return paths


def _hashes(values: Iterable[bytes]) -> np.ndarray:
    """uint64 [n, 2]"""
    digests = b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in values)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)
