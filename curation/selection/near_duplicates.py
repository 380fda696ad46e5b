"""Keep one of pictures that look the same: greedy over perceptual hashes, first in the pool's order first.

A picture is dropped when one that is kept lies within `distance` bits of it, so
every dropped picture has a kept neighbour, and a chain of slow changes is not
eaten whole as it would be by connected components.

Of equal hashes all but the first go at once. The others are cut into bands: two
hashes that differ in at most d bits agree in at least m - d of m bands, so each
is sent once for every choice of m - d bands, under these bits, and only hashes
that share them are compared. More bands make longer keys and fewer chance
meetings; as many are taken as the pool's size asks for, and none is missed.
What is left to decide in one worker are the near pairs alone, some at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from math import comb
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Apart, Count, Program, Shuffle, among, row_table
from curation.shuffle import RowFiles, hash_buckets

BITS = 64
MOST_KEYS = 40  # of one hash
PAIRS = 1 << 18  # near pairs that are decided at once
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: spreads keys over the buckets


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Pictures whose 64-bit `column` differs in at most `distance` bits (0 to 15) are the same.

    Near pairs are decided in the pool's order by one worker, which holds PAIRS of them.
    """

    distance: int = 4
    column: str = "phash"
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= 15:
            raise UserError(
                f"near_duplicates: distance {self.distance} is not in 0..15; unrelated hashes differ in about 32"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def decide(self) -> Program:
        """{"dropped"}"""
        equal = yield Shuffle(self._hashes, _later, row_bytes=16)
        if not self.distance:
            return {"dropped": [equal]}
        keys = keys_for((yield Count()), self.distance)
        near = yield Shuffle(
            partial(self._keyed, equal, keys), partial(_pairs, self.distance), row_bytes=24, spread=len(keys)
        )
        gone = yield Apart(lambda folder: greedy(near))
        return {"dropped": [equal, gone]}

    def _hashed(self, table: pa.Table) -> pa.Table:
        """The rows that have a hash; one without looks like nothing."""
        return table.select([self.column, "row"]).drop_null()

    def _hashes(self, table: pa.Table, buckets: int) -> pa.Table:
        table = self._hashed(table)
        hashes = table[self.column].to_numpy()
        bucket = hash_buckets(hashes * MIX, buckets)
        return pa.table({"hash": hashes, "row": table["row"], "bucket": bucket})

    def _keyed(self, equal: RowFiles, keys: list[np.uint64], table: pa.Table, buckets: int) -> pa.Table:
        table = self._hashed(table)
        rows = table["row"].to_numpy()
        first = ~among(rows, [equal])
        rows, hashes = rows[first], table[self.column].to_numpy()[first]
        # The number of the choice goes into the key, or equal bits of other bands would meet too.
        keyed = np.concatenate([((hashes & mask) ^ np.uint64(n)) * MIX for n, mask in enumerate(keys)])
        return pa.table(
            {
                "key": keyed,
                "hash": np.tile(hashes, len(keys)),
                "row": np.tile(rows, len(keys)),
                "bucket": hash_buckets(keyed, buckets),
            }
        )

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}


def _later(pieces: Iterator[pa.Table]) -> tuple[pa.Table, None]:
    """All rows but the first of each hash. Pieces come in the pool's order, so the first seen is the first."""
    seen, later = np.zeros(0, np.uint64), []
    for piece in pieces:
        hashes, rows = np.concatenate([seen, piece["hash"].to_numpy()]), piece["row"].to_numpy()
        unique, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(hashes), bool)
        repeated[first] = False
        later.append(rows[repeated[len(seen) :]])
        seen = unique
    return row_table(np.concatenate(later)), None


def keys_for(rows: int, distance: int) -> list[np.uint64]:
    """Masks of bits, such that hashes within the distance agree under one of them: few long ones for a large pool."""
    bands = distance + 1
    while BITS * (bands - distance) / bands < np.log2(max(rows, 2)) - 3 and comb(bands + 1, distance) <= MOST_KEYS:
        bands += 1
    edges = [BITS * n // bands for n in range(bands + 1)]
    masks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(masks, bands - distance)]


def _pairs(distance: int, pieces: Iterator[pa.Table]) -> tuple[pa.Table, None]:
    """(row, earlier) of all hashes in the bucket that share a key and are near."""
    table = pa.concat_tables(pieces)
    key, hashes, rows = (table[name].to_numpy() for name in ("key", "hash", "row"))
    order = np.lexsort((rows, key))
    key, hashes, rows = key[order], hashes[order], rows[order]
    ends = np.searchsorted(key, key, "right")
    here = np.arange(len(key))
    later, earlier = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    step = 0
    while len(here):  # each with the next one, the one after, ... of its run
        step += 1
        here = here[here + step < ends[here]]
        apart = np.bitwise_count(hashes[here] ^ hashes[here + step])
        near = here[(apart <= distance) & (rows[here] != rows[here + step])]  # two keys of one hash may be equal
        later.append(rows[near + step])
        earlier.append(rows[near])
    pairs = np.unique(np.stack([np.concatenate(later), np.concatenate(earlier)], axis=1), axis=0)
    return pa.table({"row": pairs[:, 0], "earlier": pairs[:, 1]}), None


def greedy(near: RowFiles) -> RowFiles:
    """The rows that go, when each stays unless an earlier one that stays is near.

    From the first row on, as many at a time as have about PAIRS pairs. What has gone is in files, looked into and not
    held.
    """
    gone = RowFiles(folder=near.folder / "gone", count=0, summaries=[])
    carried: list[pa.RecordBatch] = []  # the pairs of the last row, of which the next batch may have more
    for batch in near.in_order(PAIRS):
        rows = batch["row"].to_numpy()
        whole = int(np.searchsorted(rows, rows[-1:], "left")[0]) if len(rows) else 0
        if whole:
            gone = gone.plus(row_table(_gone(pa.Table.from_batches([*carried, batch.slice(0, whole)]), gone))).merged()
            carried = []
        carried.append(batch.slice(whole))
    if carried:
        gone = gone.plus(row_table(_gone(pa.Table.from_batches(carried), gone))).merged()
    return gone


def _gone(pairs: pa.Table, before: RowFiles) -> np.ndarray:
    """Of the pairs of all rows from one to another, by row, the rows that go, where `before` are those before them."""
    later, earlier = pairs["row"].to_numpy(), pairs["earlier"].to_numpy()
    rows, firsts = np.unique(later, return_index=True)
    if not len(rows):
        return rows
    here = earlier >= rows[0]
    asked, place = np.unique(earlier, return_inverse=True)
    went = among(asked, [before])[place]
    # A row near to one from before these that stays goes in any case; of the others, those must be asked in order.
    goes = np.logical_or.reduceat(~here & ~went, firsts)
    ends = np.append(firsts[1:], len(later))
    at = np.searchsorted(rows, earlier)  # where the earlier one is, if it is a later one of a pair itself
    known = (at < len(rows)) & (rows[np.minimum(at, len(rows) - 1)] == earlier)
    for i in np.flatnonzero(~goes).tolist():
        mine = slice(firsts[i], ends[i])
        stays = ~(known[mine] & goes[at[mine] % len(rows)])
        goes[i] = (here[mine] & stays).any()
    return rows[goes]
