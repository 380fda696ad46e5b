"""Clusters of embeddings, for every selector that needs them: a sample by hash, FAISS's k-means, the nearest centroid.

What trains the centroids is chosen by hash(seed, uid), so it depends on neither
order nor partition. FAISS runs on one thread here, so that sums have one order.
"""

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection.nearest import Metric, Nearest, one_thread

ITERATIONS = 20

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


def sample_rows(table: pa.Table, column: str, seed: int, size: int) -> Sample:
    """The m <= size rows with the lowest hashes."""
    hashes = hash64_many(f"{seed}/cluster sample", table["uid"].to_pylist())
    chosen = np.argsort(hashes, kind="stable")[:size]
    return hashes[chosen], embeddings(table, column)[chosen]


def train(
    samples: list[Sample], *, clusters: int, size: int, seed: int, iterations: int = ITERATIONS, spherical: bool = True
) -> np.ndarray | None:
    """K-means over the `size` rows with the lowest hashes of all samples.

    `spherical` gives centroids of norm 1, moved by cosine; else they are means, moved by L2.

    Returns:
        Centroids float32 [min(clusters, rows), D], or None where there are no rows.
    """
    import faiss

    hashes = np.concatenate([s[0] for s in samples])
    chosen = np.argsort(hashes, kind="stable")[:size]
    if not len(chosen):
        return None
    points = np.concatenate([s[1] for s in samples])[chosen].astype(np.float32)
    kmeans = faiss.Kmeans(
        points.shape[1],
        min(clusters, len(chosen)),
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(chosen),
    )
    with one_thread():
        kmeans.train(points)
    return kmeans.centroids


def nearest(points: np.ndarray, centroids: np.ndarray, metric: Metric = "ip") -> np.ndarray:
    """The centroid (float32 [K, D]) with the largest dot product or the smallest L2 distance to each point.

    Args:
        points: [n, D], of any float type.

    Returns:
        int32 [n].
    """
    return Nearest(centroids, metric)(points)
