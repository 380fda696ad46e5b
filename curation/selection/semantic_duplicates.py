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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.selection import clustering
from curation.selection.interface import Pass, dropped_rows

BLOCK = 1024  # rows that are compared at once ...
TILE = 8192  # ... with so many earlier ones: 32 MiB of cosines


class Assigned(NamedTuple):
    """The survivors of one part: cluster int32 [m], row int64 [m], points float16 [m, D], uid [m]."""

    cluster: np.ndarray
    row: np.ndarray
    points: np.ndarray
    uid: pa.ChunkedArray


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates:
    """Survivors whose `column` has a cosine above 1 - `eps` (in (0, 1)) in one of `clusters` clusters are copies.

    `sample`: rows that train the centroids, in so many `iterations`.

    Memory: the embeddings of all survivors in float16, in the one process that
    decides (10 million of 768 values are 15 GB; through Ray they lie in its
    object store), about 100 bytes a row beside them, and the largest cluster
    twice in float32.
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

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._sample, self._train), Pass(self._assign, self._compare))

    def _sample(self, table: pa.Table, decision: Any) -> clustering.Sample:
        return clustering.sample_rows(table, self.column, self.seed, self.sample)

    def _train(self, summaries: list[clustering.Sample], decision: Any) -> np.ndarray | None:
        return clustering.train(
            summaries, clusters=self.clusters, size=self.sample, seed=self.seed, iterations=self.iterations
        )

    def _assign(self, table: pa.Table, centroids: np.ndarray | None) -> Assigned:
        points = clustering.embeddings(table, self.column)
        # Without centroids there are no rows.
        cluster = np.zeros(0, np.int32) if centroids is None else clustering.nearest(points, centroids)
        return Assigned(cluster, table["row"].to_numpy(), points, table["uid"])

    def _compare(self, parts: list[Assigned], centroids: np.ndarray | None) -> dict[str, Any]:
        """{"dropped": int64 sorted, "before": rows of each cluster int64 [K], "after": what stays of them}"""
        if centroids is None:
            return {name: np.zeros(0, np.int64) for name in ("dropped", "before", "after")}
        cluster = np.concatenate([p.cluster for p in parts])
        rows = np.concatenate([p.row for p in parts])
        uid_rank = pc.rank(pa.chunked_array([c for p in parts for c in p.uid.chunks], pa.string()), tiebreaker="min")
        uid_rank = uid_rank.to_numpy()
        part = np.repeat(np.arange(len(parts)), [len(p.row) for p in parts])
        place = np.concatenate([np.arange(len(p.row)) for p in parts])
        sizes = np.bincount(cluster, minlength=len(centroids))
        by_cluster = np.argsort(cluster, kind="stable")
        dropped, after = [], sizes.copy()
        for k, members in enumerate(np.split(by_cluster, np.cumsum(sizes)[:-1])):
            if len(members) < 2:
                continue
            likeness = np.empty(len(members))
            points = _gather(parts, part[members], place[members])
            for start in range(0, len(members), BLOCK):
                _normalize(points[start : start + BLOCK], centroids[k], likeness[start : start + BLOCK])
            order = np.lexsort((rows[members], uid_rank[members], likeness))
            points = points[order]
            dropped.append(rows[members[order[~keep_distinct(points, self.eps, self.mode)]]])
            after[k] -= len(dropped[-1])
        rows_dropped = np.sort(np.concatenate([np.zeros(0, np.int64), *dropped]))
        return {"dropped": rows_dropped, "before": sizes, "after": after}

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        return dropped_rows(table, decision["dropped"])

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


def _gather(parts: list[Assigned], part: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The rows at these places of these parts (int64 [n], parts ascending) as float32 [n, D]."""
    points = np.empty((len(part), parts[0].points.shape[1]), np.float32)
    present, starts = np.unique(part, return_index=True)
    for which, start, end in zip(present, starts, [*starts[1:], len(part)], strict=True):
        points[start:end] = parts[which].points[place[start:end]]
    return points


def _normalize(points: np.ndarray, centroid: np.ndarray, likeness: np.ndarray) -> None:
    """Scale rows to norm 1 in place, since float16 has moved them off it, and write their cosines to the centroid.

    Row by row in float64 rather than by a matrix product, whose last bits hang on
    the row's place: copies must tie exactly for their uids to decide.
    """
    exact = points.astype(np.float64)
    exact /= np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    points[:] = exact
    likeness[:] = (exact * centroid).sum(axis=1)
