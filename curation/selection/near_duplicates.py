"""Keep one of pictures that look the same: greedy over perceptual hashes, first in the pool's order first.

A picture is dropped when one that is kept lies within `distance` bits of it, so
every dropped picture has a kept neighbour, and a chain of slow changes is not
eaten whole as it would be by connected components. Neighbours come from FAISS's
multi-index hashing: two hashes that differ in at most d bits agree in one of
d + 1 bands, which makes the search exact without comparing all with all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Pass, dropped_rows

BITS = 64


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Pictures whose 64-bit `column` differs in at most `distance` bits (0 to 15) are the same."""

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

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._local, self._decide),)

    def _local(self, table: pa.Table, decision: Any) -> tuple[np.ndarray, np.ndarray]:
        return table[self.column].to_numpy(), table["row"].to_numpy()

    def _decide(self, summaries: list[tuple[np.ndarray, np.ndarray]], decision: Any) -> np.ndarray:
        """The rows to drop: int64, sorted."""
        hashes = np.concatenate([s[0] for s in summaries])
        rows = np.concatenate([s[1] for s in summaries])
        order = np.argsort(rows, kind="stable")
        # Equal hashes first: only the first of each can be kept, and blank pictures would fill whole buckets.
        unique, first = np.unique(hashes[order], return_index=True)
        by_place = np.argsort(first, kind="stable")
        kept = order[first[by_place][greedy(unique[by_place], self.distance)]]
        return np.setdiff1d(rows, rows[kept], assume_unique=True)

    def apply(self, table: pa.Table, decision: np.ndarray) -> np.ndarray:
        return dropped_rows(table, decision)

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}


def greedy(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Which of these distinct hashes (uint64 [n]) to keep, the first first: bool [n]."""
    keep = np.ones(len(hashes), bool)
    if distance == 0 or len(hashes) < 2:
        return keep
    import faiss

    codes = hashes.astype("<u8").view(np.uint8).reshape(-1, BITS // 8)
    index = faiss.IndexBinaryMultiHash(BITS, distance + 1, BITS // (distance + 1))
    index.add(codes)
    limits, _, neighbours = index.range_search(codes, distance + 1)  # FAISS's radius is exclusive
    for i in np.flatnonzero(np.diff(limits.astype(np.int64)) > 1):
        earlier = neighbours[limits[i] : limits[i + 1]]
        keep[i] = not keep[earlier[earlier < i]].any()
    return keep
