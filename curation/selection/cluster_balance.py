"""Flatten the pool: cluster image embeddings by FAISS's spherical k-means and cap what one cluster may give.

Two passes: the first takes a sample by hash and trains the centroids, the
second assigns every survivor and sees how large the clusters are. Inside a
cluster hash(seed, uid) chooses, so the choice depends on neither order nor
partition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection import clustering
from curation.selection.interface import Pass, dropped_rows


@dataclass(frozen=True, kw_only=True)
class ClusterBalance:
    """At most so many survivors of each of `clusters` clusters of `column` (unit-norm embeddings). Set one cap:

    `cap`: a count. `cap_quantile`: this quantile of the cluster sizes.
    `max_share`: this share of the survivors. `sample`: rows that train the centroids.
    """

    column: str = "clip_image_embedding"
    clusters: int
    cap: int | None = None
    cap_quantile: float | None = None
    max_share: float | None = None
    sample: int = 100_000
    seed: int = 0
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if sum(c is not None for c in (self.cap, self.cap_quantile, self.max_share)) != 1:
            raise UserError("cluster_balance: set exactly one of cap, cap_quantile and max_share")
        if self.clusters < 1 or self.sample < 1:
            raise UserError("cluster_balance: clusters and sample are at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column, "uid")

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._sample, self._train), Pass(self._assign, self._choose))

    def _sample(self, table: pa.Table, decision: Any) -> clustering.Sample:
        return clustering.sample_rows(table, self.column, self.seed, self.sample)

    def _train(self, summaries: list[clustering.Sample], decision: Any) -> np.ndarray | None:
        return clustering.train(summaries, clusters=self.clusters, size=self.sample, seed=self.seed)

    def _assign(self, table: pa.Table, centroids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cluster int32, hash uint64, row int64), each [rows]."""
        rows = table["row"].to_numpy()
        if centroids is None or not len(rows):
            return np.zeros(0, np.int32), np.zeros(0, np.uint64), rows
        return (
            clustering.nearest(clustering.embeddings(table, self.column), centroids),
            hash64_many(f"{self.seed}/cluster choice", table["uid"].to_pylist()),
            rows,
        )

    def _choose(self, summaries: list[tuple[np.ndarray, np.ndarray, np.ndarray]], centroids: Any) -> dict[str, Any]:
        """{"dropped": int64 sorted, "cap", "before": sizes, "after": sizes}"""
        cluster, hashes, rows = (np.concatenate([s[i] for s in summaries]) for i in range(3))
        if not len(rows):
            return {"dropped": rows, "cap": 0, "before": [], "after": []}
        sizes = np.bincount(cluster, minlength=len(centroids))
        if self.cap is not None:
            cap = self.cap
        elif self.cap_quantile is not None:
            cap = int(np.ceil(np.quantile(sizes[sizes > 0], self.cap_quantile)))
        else:
            cap = int(np.ceil(len(rows) * (self.max_share or 0.0)))
        order = np.lexsort((rows, hashes, cluster))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        rank = np.arange(len(rows)) - starts[cluster[order]]
        return {
            "dropped": np.sort(rows[order[rank >= cap]]),
            "cap": cap,
            "before": sizes.tolist(),
            "after": np.minimum(sizes, cap).tolist(),
        }

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        return dropped_rows(table, decision["dropped"])

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        return {"clusters": {"cap": decision["cap"], "before": decision["before"], "after": decision["after"]}}
