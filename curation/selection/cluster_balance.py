"""Flatten the pool: cluster image embeddings by FAISS's spherical k-means and cap what one cluster may give.

A sample by hash trains the centroids, every survivor is assigned and the sizes
of the clusters are counted, then each cluster's rows meet. Inside a cluster
hash(seed, uid) chooses, so the choice depends on neither order nor partition.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection import clustering
from curation.selection.interface import Fold, Program, Shuffle, row_table


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
        if self.cap is not None and self.cap < 1:
            raise UserError(f"cluster_balance: cap {self.cap} is not at least 1")
        if self.cap_quantile is not None and not 0 <= self.cap_quantile <= 1:
            raise UserError(f"cluster_balance: cap_quantile {self.cap_quantile} is not in [0, 1]")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise UserError(f"cluster_balance: max_share {self.max_share} is not in (0, 1]")
        if self.clusters < 1 or self.sample < 1:
            raise UserError("cluster_balance: clusters and sample are at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column, "uid")

    def decide(self) -> Program:
        """{"dropped", "cap", "before": sizes, "after": sizes}"""
        centroids = yield from clustering.trained(self.column, clusters=self.clusters, size=self.sample, seed=self.seed)
        if centroids is None:
            return {"dropped": [], "cap": 0, "before": [], "after": []}
        assign = partial(clustering.assigned, self.column, centroids)
        sizes = yield Fold(assign, np.add, columns=(self.column,))
        cap = self._cap(sizes)
        gone = yield Shuffle(
            partial(self._rows, centroids.count), partial(_beyond, cap), row_bytes=20, columns=("uid", "cluster")
        )
        return {
            "dropped": [gone],
            "cap": cap,
            "before": sizes.tolist(),
            "after": np.minimum(sizes, cap).tolist(),
        }

    def _cap(self, sizes: np.ndarray) -> int:
        if self.cap is not None:
            return self.cap
        if self.cap_quantile is not None:
            return int(np.ceil(np.quantile(sizes[sizes > 0], self.cap_quantile)))
        # As it is written: in floats 100 rows have a share of 0.07 of more than 7.
        return math.ceil(int(sizes.sum()) * Decimal(str(self.max_share)))

    def _rows(self, clusters: int, table: pa.Table, buckets: int) -> pa.Table:
        table = clustering.in_clusters(table)
        cluster = table["cluster"].to_numpy()
        hashes = hash64_many(f"{self.seed}/cluster choice", table["uid"].to_pylist())
        bucket = cluster.astype(np.int64) * buckets // clusters
        return pa.table({"cluster": cluster, "hash": hashes, "row": table["row"], "bucket": bucket})

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        return {"clusters": {"cap": decision["cap"], "before": decision["before"], "after": decision["after"]}}


def _beyond(cap: int, pieces: Iterator[pa.Table]) -> tuple[pa.Table, None]:
    """The rows that are not among the `cap` lowest hashes of their cluster; no more than those are held."""
    kept: list[pa.Table] = []
    gone = []
    for piece in pieces:
        both = pa.concat_tables([*kept, piece])
        cluster, hashes, rows = (both[name].to_numpy() for name in ("cluster", "hash", "row"))
        order = np.lexsort((rows, hashes, cluster))
        starts = np.searchsorted(cluster[order], cluster[order])
        inside = np.arange(len(order)) - starts < cap
        gone.append(rows[order[~inside]])
        kept = [both.take(pa.array(order[inside]))]
    return row_table(np.concatenate(gone)), None
