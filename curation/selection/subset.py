"""Lists of uids as numbers, as DataComp's subset files have them, looked up where they lie.

A uid of 32 hex digits, in either case, is the number that it spells; of any
other uid, which DataComp's never are, it is the md5. The build names its samples
by the same numbers (`sample_ids.npy`), so its list selects what it lists.

A subset (.npy of u8,u8: the halves, sorted, repeats legal; or those alone, without
a header, as a memory map leaves them) may name as many uids as the pool has, so no
process reads it whole. The pool's uids are cut into
ranges at the subset's own quantiles; each range is brought together (a shuffle)
and met with its stretch of the file, block by block, so that all of the file is
read once.
"""

import codecs
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError

PAIR = np.dtype("u8,u8")
BLOCK = 1 << 20  # uids of the file in memory at once
MAGIC = b"\x93NUMPY"  # at the start of a .npy
HEAD = 1 << 16  # bytes by which a file without a header is known for a subset
HEX = "^[0-9a-fA-F]{32}$"
Pairs = tuple[np.ndarray, np.ndarray]
"""The high and the low halves of uids as numbers: uint64 [n] both."""


def numbers(uids: Sequence[str]) -> Pairs:
    """Uids as numbers of 128 bits: what 32 hex digits spell, and the md5 of any other."""
    digits = uids
    if not pc.all(pc.match_substring_regex(pa.array(uids, pa.string()), HEX)).as_py():
        digits = [uid if re.fullmatch(HEX, uid) else hashlib.md5(uid.encode()).hexdigest() for uid in uids]
    pairs = np.frombuffer(bytes.fromhex("".join(digits)), ">u8").astype("u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def paired(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """As a subset file holds them: u8,u8 [n]."""
    return np.stack([high, low], axis=1).reshape(-1).view(PAIR)


def is_subset(path: Path) -> bool:
    """Whether a list of uids has them as numbers: one called .npy, and by its content one of any name but .parquet.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix in (".npy", ".parquet"):
        return path.suffix == ".npy"
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or _is_raw(path)
    except OSError as reason:
        raise UserError(f"uids: {path}: cannot be read as a list of uids ({reason})") from None


def _is_raw(path: Path) -> bool:
    """Whether a file is a subset without a header, of which nothing in it says so: whole pairs, no text, and in order
    as far as is looked, which text in another encoding, or a packed file, of such a size is not."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head or path.stat().st_size % PAIR.itemsize or _is_text(head):
        return False
    pairs = np.frombuffer(head, PAIR)
    high, low = pairs["f0"], pairs["f1"]
    return not before((high[1:], low[1:]), (high[:-1], low[:-1])).any()


def _is_text(head: bytes) -> bool:
    """Whether a file that begins so may be UTF-8."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False


@dataclass(frozen=True)
class Subset:
    """The file of a subset; of one that is not sorted only `blocks` and `sizes` mean something."""

    path: Path

    def opened(self) -> np.memmap:
        """u8,u8 [n]

        Raises:
            UserError: the file is no subset.
        """
        try:
            with self.path.open("rb") as file:
                raw = file.read(len(MAGIC)) != MAGIC
            if raw and not _is_raw(self.path):
                raise ValueError("it has no header of .npy, nor are its bytes pairs of u8 in order")
            pairs: np.memmap = np.memmap(self.path, PAIR, "r") if raw else np.load(self.path, mmap_mode="r")
        except (OSError, ValueError) as reason:
            raise UserError(f"uids: {self.path}: cannot be read as a list of uids ({reason})") from None
        if pairs.dtype != PAIR or pairs.ndim != 1:
            raise UserError(f"uids: {self.path}: dtype is {pairs.dtype}; a DataComp subset has u8,u8")
        return pairs

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[Pairs]:
        """The uids of these places, BLOCK at a time; read, since the pages of a map would count as memory."""
        pairs = self.opened()
        end = len(pairs) if end is None else end
        with open(self.path, "rb") as file:
            file.seek(pairs.offset + PAIR.itemsize * start)
            while start < end:
                block = np.fromfile(file, PAIR, min(BLOCK, end - start))
                start += len(block)
                yield np.ascontiguousarray(block["f0"]), np.ascontiguousarray(block["f1"])

    def sizes(self) -> tuple[int, int, bool]:
        """(distinct uids, all, whether they are sorted); the first is right of sorted ones alone"""
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
        """The uids of a partition, each to the bucket of its range; equal ones meet."""
        asked = numbers(table["uid"].to_pylist())
        pairs = self.opened()
        cuts = np.asarray(pairs[len(pairs) * np.arange(1, buckets) // buckets]) if len(pairs) else np.zeros(0, PAIR)
        bucket = places((cuts["f0"], cuts["f1"]), asked, after=True)
        return pa.table({"high": asked[0], "low": asked[1], "row": table["row"], "bucket": bucket})

    def counted(self, pieces: Iterator[pa.Table]) -> tuple[pa.Table, int]:
        """(of each row of a range that the list names: `row`, and `often`, how many times; how many uids these are)

        Piece by piece, since of a short list a range may hold much of the pool, and hardly any of it is named.
        """
        found = [self._named(table) for table in pieces]
        high, low, rows, often = (np.concatenate(values) for values in zip(*found, strict=True))
        return pa.table({"row": rows, "often": often}), len(np.unique(paired(high, low)))

    def _named(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows that the list names: the halves of their uids, the rows, and how often."""
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
                often[first:last] += times(block, (asked[0][first:last], asked[1][first:last]))
        named = often > 0
        return asked[0][named], asked[1][named], rows[named], often[named]


def before(one: Pairs, other: Pairs) -> np.ndarray:
    """Which uids are lower than the other ones: bool [n]."""
    return (one[0] < other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))


def times(pairs: Pairs, asked: Pairs) -> np.ndarray:
    """How often each of these uids is among the sorted pairs: int64 [n]."""
    return places(pairs, asked, after=True) - places(pairs, asked, after=False)


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
