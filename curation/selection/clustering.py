"""Clusters of embeddings, for every selector that needs them: a sample by hash, FAISS's k-means, the nearest centroid.

What trains the centroids is chosen by hash(seed, uid), so it depends on neither
order nor partition. FAISS runs on one thread here, so that sums have one order.
"""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection.interface import Count, Fold, Program
from curation.selection.nearest import Metric, Nearest, one_thread

ITERATIONS = 20
BLOCK = 16_384  # points that are widened to float32 and searched at once

Sample = tuple[np.ndarray, np.ndarray]
"""(hashes uint64 [m], embeddings float16 [m, D])"""


def embeddings(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-size list column without nulls, as it is stored: [rows, D].

    Raises:
        UserError: the column is of another type.
    """
    if not pa.types.is_fixed_size_list(table.schema.field(column).type):
        raise UserError(f"column {column}: holds no embeddings; name one that ends in _image_embedding")
    values = table[column].combine_chunks()
    width = values.type.list_size
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def trained(
    column: str, *, clusters: int, size: int, seed: int, iterations: int = ITERATIONS, spherical: bool = True
) -> Program:
    """A program that returns k-means centroids over the `size` rows with the lowest hashes.

    `spherical` gives centroids of norm 1, moved by cosine; else they are means, moved by L2.

    Returns:
        Centroids float32 [min(clusters, rows), D], or None where there are no rows.
    """
    rows = yield Count()
    if not rows:
        return None
    wanted = min(size, rows)
    share = wanted / rows
    while True:  # a little more than is wanted, which is then there at once but for one time in thousands
        limit = min(1.0, share + 4 * np.sqrt(share / rows))
        lowest = partial(_lowest, column, seed, size, limit)
        hashes, points = yield Fold(lowest, partial(_lower, size), columns=(column, "uid"))
        if len(hashes) == wanted:
            return train(points.astype(np.float32), clusters, seed, iterations, spherical)
        share = 2 * limit


def _lowest(column: str, seed: int, size: int, limit: float, table: pa.Table) -> Sample:
    """The m <= size rows with the lowest hashes, of those below this share of all hashes."""
    hashes = hash64_many(f"{seed}/cluster sample", table["uid"].to_pylist())
    chosen = np.argsort(hashes, kind="stable")[:size]
    chosen = chosen[hashes[chosen] <= np.float64(limit) * 2.0**64] if limit < 1 else chosen
    return hashes[chosen], embeddings(table, column)[chosen]


def _lower(size: int, a: Sample, b: Sample) -> Sample:
    hashes, points = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
    chosen = np.argsort(hashes, kind="stable")[:size]
    return hashes[chosen], points[chosen]


def train(points: np.ndarray, clusters: int, seed: int, iterations: int, spherical: bool) -> np.ndarray:
    """FAISS's k-means over the points (float32 [n, D]): float32 [min(clusters, n), D]."""
    import faiss

    kmeans = faiss.Kmeans(
        points.shape[1],
        min(clusters, len(points)),
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    with one_thread():
        kmeans.train(points)
    centroids: Any = kmeans.centroids
    return centroids


def nearest(points: np.ndarray, centroids: np.ndarray, metric: Metric = "ip") -> np.ndarray:
    """The centroid (float32 [K, D]) with the largest dot product or the smallest L2 distance to each point.

    Args:
        points: [n, D], of any float type.

    Returns:
        int32 [n].
    """
    return Nearest(centroids, metric)(points)
