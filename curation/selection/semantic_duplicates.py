"""Drop pictures that mean the same: SemDeDup (Abbas et al. 2023, arXiv 2303.09540), with a mode that eats no chains.

Spherical k-means splits the survivors, and rows are compared inside their
cluster alone. There the row that is farthest from the centroid comes first
("hard", as the paper keeps them; ties by uid), and a row goes when an earlier
one has a cosine above 1 - eps. In mode "semdedup" every earlier row counts,
dropped ones too: a chain of slow changes loses all but its first. In mode
"greedy" only rows that are kept count, so each dropped row has a kept neighbour
within eps.

Comparing all with all takes a matrix of n x n for a cluster of n rows. Here
blocks of rows meet tiles of earlier rows, and a row that is found dropped meets
no further tile: at most half of the products, and no more than one tile in
memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.selection import clustering
from curation.selection.interface import Fold, Program, Shuffle, row_table

BLOCK = 1024  # rows that are compared at once ...
TILE = 8192  # ... with so many earlier ones: 32 MiB of cosines


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates:
    """Survivors whose `column` has a cosine above 1 - `eps` (in (0, 1)) in one of `clusters` clusters are copies.

    `sample`: rows that train the centroids, in so many `iterations`.

    Memory, in a worker: the sample in float32; later the centroids and the largest cluster, twice in float32.
    """

    column: str = "clip_image_embedding"
    clusters: int
    eps: float
    mode: Literal["semdedup", "greedy"] = "greedy"
    sample: int = 100_000
    iterations: int = clustering.ITERATIONS
    seed: int = 0
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise UserError(f"semantic_duplicates: eps {self.eps} is not in (0, 1); copies have cosines above 1 - eps")
        for name in ("clusters", "sample", "iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"semantic_duplicates: {name} {getattr(self, name)} is not at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column, "uid")

    def decide(self) -> Program:
        """{"dropped", "before": rows of each cluster int64 [K], "after": what stays of them}"""
        centroids = yield from clustering.trained(
            self.column, clusters=self.clusters, size=self.sample, seed=self.seed, iterations=self.iterations
        )
        if centroids is None:
            return {"dropped": [], "before": np.zeros(0, np.int64), "after": np.zeros(0, np.int64)}
        assign = partial(clustering.assigned, self.column, centroids)
        sizes = yield Fold(assign, np.add, columns=(self.column,))
        before = np.concatenate([[0], np.cumsum(sizes)])  # rows of earlier clusters: buckets hold about equally many
        gone = yield Shuffle(
            partial(self._rows, before), partial(self._compare, centroids), row_bytes=2 * centroids.width + 64
        )
        after = sizes.copy()
        for clusters, counts in gone.summaries:
            after[clusters] -= counts
        return {"dropped": [gone], "before": sizes, "after": after}

    def _rows(self, before: np.ndarray, table: pa.Table, buckets: int) -> pa.Table:
        table = clustering.in_clusters(table)
        cluster = table["cluster"].to_numpy()
        bucket = before[cluster] * buckets // max(before[-1], 1)
        return table.select(["cluster", "row", "uid", self.column]).append_column("bucket", pa.array(bucket))

    def _compare(self, stored: clustering.Centroids, pieces: Iterator[pa.Table]) -> tuple[pa.Table, Any]:
        """(the rows that go; the clusters that lose some, and how many each)"""
        centroids = stored()
        table = pa.concat_tables(pieces).combine_chunks()
        cluster, rows = table["cluster"].to_numpy(), table["row"].to_numpy()
        embedded = clustering.embeddings(table, self.column)
        uid_rank = pc.rank(table["uid"], tiebreaker="min").to_numpy()
        by_cluster = np.argsort(cluster, kind="stable")
        dropped = [np.zeros(0, np.int64)]  # places in the table
        for members in np.split(by_cluster, np.flatnonzero(np.diff(cluster[by_cluster])) + 1):
            if len(members) < 2:
                continue
            likeness = np.empty(len(members))
            points = embedded[members].astype(np.float32)
            for start in range(0, len(members), BLOCK):
                _normalize(
                    points[start : start + BLOCK], centroids[cluster[members[0]]], likeness[start : start + BLOCK]
                )
            order = np.lexsort((rows[members], uid_rank[members], likeness))
            points = points[order]
            dropped.append(members[order[~keep_distinct(points, self.eps, self.mode)]])
        gone = np.concatenate(dropped)
        return row_table(rows[gone]), np.unique(cluster[gone], return_counts=True)

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        sizes = decision["before"]
        return {
            "filled_clusters": int((sizes > 0).sum()),
            "largest_cluster": int(sizes.max(initial=0)),
            "clusters": {"before": sizes.tolist(), "after": decision["after"].tolist()},
        }


def keep_distinct(points: np.ndarray, eps: float, mode: Literal["semdedup", "greedy"]) -> np.ndarray:
    """Which of these rows to keep, where earlier rows are preferred.

    Args:
        points: float32 [n, D] of norm 1. Mode "greedy" overwrites it: the kept
            rows move to the front, so that later blocks meet them in one product.

    Returns:
        bool [n].
    """
    limit = np.float32(1 - eps)
    keep = np.zeros(len(points), bool)
    earlier = 0  # the rows at the front of `points` that a block is compared with
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        fresh = np.arange(len(block))
        for tile in range(0, earlier, TILE):
            fresh = fresh[(block[fresh] @ points[tile : min(tile + TILE, earlier)].T).max(axis=1) <= limit]
            if not len(fresh):
                break
        if mode == "semdedup":
            close = np.tril(block @ block.T > limit, -1).any(axis=1)
            fresh = fresh[~close[fresh]]
            earlier += len(block)
        else:
            fresh = fresh[_keep_greedily(block[fresh] @ block[fresh].T > limit)]
            points[earlier : earlier + len(fresh)] = block[fresh]
            earlier += len(fresh)
        keep[start + fresh] = True
    return keep


def _keep_greedily(close: np.ndarray) -> np.ndarray:
    """Each row unless it is close to an earlier one that is kept: bool [n] of bool [n, n]."""
    keep = np.ones(len(close), bool)
    for i in np.flatnonzero(np.tril(close, -1).any(axis=1)):
        keep[i] = not (close[i, :i] & keep[:i]).any()
    return keep


def _normalize(points: np.ndarray, centroid: np.ndarray, likeness: np.ndarray) -> None:
    """Scale rows to norm 1 in place, since float16 has moved them off it, and write their cosines to the centroid.

    Row by row in float64 rather than by a matrix product, whose last bits hang on
    the row's place: copies must tie exactly for their uids to decide.
    """
    exact = points.astype(np.float64)
    exact /= np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    points[:] = exact
    likeness[:] = (exact * centroid).sum(axis=1)
