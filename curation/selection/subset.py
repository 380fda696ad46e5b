"""DataComp's subset files, looked up where they lie: .npy of u8,u8, the halves of 32 hex digits, sorted, repeats legal.

A subset may name as many uids as the pool has, so no process reads it whole.
The pool's uids are cut into ranges at the subset's own quantiles; each range is
brought together (a shuffle) and met with its stretch of the file, block by
block, so that all of the file is read once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError

PAIR = np.dtype("u8,u8")
BLOCK = 1 << 20  # uids of the file in memory at once
HEX = "^[0-9a-f]{32}$"  # what DataComp's uids are; no other is in a subset
Pairs = tuple[np.ndarray, np.ndarray]
"""The high and the low halves of uids: uint64 [n] both."""


@dataclass(frozen=True)
class Subset:
    path: Path

    def opened(self) -> np.memmap:
        """u8,u8 [n]

        Raises:
            UserError: the file is no subset.
        """
        try:
            pairs = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError) as reason:
            raise UserError(f"uids: {self.path}: cannot be read as a list of uids ({reason})") from None
        if pairs.dtype != PAIR or pairs.ndim != 1:
            raise UserError(f"uids: {self.path}: dtype is {pairs.dtype}; a DataComp subset has u8,u8")
        return pairs

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[Pairs]:
        """The uids of these places, BLOCK at a time; read, since the pages of a map would count as memory."""
        offset, length = self.opened().offset, len(self.opened())
        end = length if end is None else end
        with open(self.path, "rb") as file:
            file.seek(offset + PAIR.itemsize * start)
            while start < end:
                block = np.fromfile(file, PAIR, min(BLOCK, end - start))
                start += len(block)
                yield np.ascontiguousarray(block["f0"]), np.ascontiguousarray(block["f1"])

    def sizes(self) -> tuple[int, int, bool]:
        """(distinct uids, all, whether they are sorted)"""
        distinct, total, ordered = 0, 0, True
        last = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        for high, low in self.blocks():
            high, low = np.append(last[0], high), np.append(last[1], low)
            rises = before((high[:-1], low[:-1]), (high[1:], low[1:]))
            same = (high[:-1] == high[1:]) & (low[:-1] == low[1:])
            ordered &= bool((rises | same).all())
            distinct += int(rises.sum()) + (not len(last[0]))
            total += len(high) - len(last[0])
            last = high[-1:], low[-1:]
        return distinct, total, ordered

    def sent(self, table: pa.Table, buckets: int) -> pa.Table:
        """The uids of a partition that a subset can name, each to the bucket of its range."""
        named = pc.fill_null(pc.match_substring_regex(table["uid"], HEX), False)
        table = table.select(["uid", "row"]).filter(named)
        high, low = np.frombuffer(bytes.fromhex("".join(table["uid"].to_pylist())), ">u8").reshape(-1, 2).T
        asked = high.astype(np.uint64), low.astype(np.uint64)
        pairs = self.opened()
        cuts = np.asarray(pairs[len(pairs) * np.arange(1, buckets) // buckets]) if len(pairs) else np.zeros(0, PAIR)
        bucket = places((cuts["f0"], cuts["f1"]), asked, after=True)
        return pa.table({"high": asked[0], "low": asked[1], "row": table["row"], "bucket": bucket})

    def counted(self, pieces: Iterator[pa.Table]) -> tuple[pa.Table, None]:
        """(of each row of a range that the subset names: `row`, and `often`, how many times; None)"""
        table = pa.concat_tables(pieces)
        high, low, rows = (table[name].to_numpy() for name in ("high", "low", "row"))
        order = np.lexsort((low, high))
        asked, rows = (high[order], low[order]), rows[order]
        often = np.zeros(len(rows), np.int64)
        if len(rows):
            pairs = self.opened()
            ends = [(one[:1], two[:1]) for one, two in (asked, (asked[0][::-1], asked[1][::-1]))]
            start, end = (int(places((pairs["f0"], pairs["f1"]), uid, after=n)[0]) for n, uid in enumerate(ends))
            for block in self.blocks(start, end):
                first = int(places(asked, (block[0][:1], block[1][:1]), after=False)[0])
                last = int(places(asked, (block[0][-1:], block[1][-1:]), after=True)[0])
                here = asked[0][first:last], asked[1][first:last]
                often[first:last] += places(block, here, after=True) - places(block, here, after=False)
        return pa.table({"row": rows[often > 0], "often": often[often > 0]}), None


def before(one: Pairs, other: Pairs) -> np.ndarray:
    """Which uids are lower than the other ones: bool [n]."""
    return (one[0] < other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))


def places(pairs: Pairs, asked: Pairs, *, after: bool | int) -> np.ndarray:
    """How many of the sorted pairs are before each of these uids, or `after`: not after it. int64 [n], by bisection."""
    start, end = np.zeros(len(asked[0]), np.int64), np.full(len(asked[0]), len(pairs[0]), np.int64)
    while len(open_ := np.flatnonzero(start < end)):
        middle = (start[open_] + end[open_]) // 2
        there, mine = (pairs[0][middle], pairs[1][middle]), (asked[0][open_], asked[1][open_])
        further = ~before(mine, there) if after else before(there, mine)
        start[open_[further]] = middle[further] + 1
        end[open_[~further]] = middle[~further]
    return start
