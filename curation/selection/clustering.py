"""Clusters of embeddings, for every selector that needs them: a sample by hash, FAISS's k-means, the nearest centroid.

What trains the centroids is chosen by hash(seed, uid), so it depends on neither
order nor partition. The sample is brought together in one worker, which trains
and leaves the centroids in a file: the process that decides holds neither, and
each that assigns maps the file into its memory. FAISS runs on one thread here,
so that sums have one order.

A sound sample may be without an embedding, where its signal gave it a null. It
trains nothing and is in no cluster.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection.interface import Count, Leaving, Program, Shuffle, Warn
from curation.selection.nearest import Metric, Nearest, one_thread
from curation.shuffle import RowFiles

ITERATIONS = 20
FEW = 10  # rows a cluster; with fewer on the average, a recipe for a large pool was taken to a small one


@dataclass(frozen=True, kw_only=True)
class Centroids:
    """`count` of them in a file; called, float32 [count, width] mapped from it."""

    count: int
    width: int
    files: RowFiles

    def __call__(self) -> np.ndarray:
        (table,) = self.files.between(0, self.count)
        return embeddings(table, "centroid")


def embeddings(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-size list column as it is stored, a row of NaN for each null: [rows, D].

    Raises:
        UserError: the column is of another type.
    """
    if not pa.types.is_fixed_size_list(table.schema.field(column).type):
        raise UserError(f"column {column}: holds no embeddings; name one that ends in _image_embedding")
    pieces = table[column]
    values = pieces.chunk(0) if pieces.num_chunks == 1 else pieces.combine_chunks()  # which would copy one, too
    width = values.type.list_size
    there = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)  # which leaves nulls out
    if not values.null_count:
        return there
    points = np.full((len(values), width), np.nan, there.dtype)
    points[values.is_valid().to_numpy(zero_copy_only=False)] = there
    return points


def having(table: pa.Table, column: str) -> pa.Table:
    """The rows that have an embedding."""
    values = table[column]
    return table.filter(values.is_valid()) if values.null_count else table


def trained(
    column: str, *, clusters: int, size: int, seed: int, iterations: int = ITERATIONS, spherical: bool = True
) -> Program:
    """A program that returns k-means `Centroids`, at most so many, over the `size` rows with the lowest hashes of those
    that have an embedding. It warns where they are so many that clusters hold, or are trained on, hardly more than a
    row each.

    `spherical` gives centroids of norm 1, moved by cosine; else they are means, moved by L2. The worker that trains
    holds `size` x D values in float32, beside the files that they come from.

    Returns:
        None where there are no embeddings.
    """
    rows = yield Count()
    if not rows:
        return None
    if clusters * FEW > rows:
        yield Warn(
            f"clusters {clusters:,} for {rows:,} samples: with fewer than {FEW} in each, alike ones fall apart; "
            f"set clusters to one for every 1,000 or so, here {max(1, rows // 1000):,}"
        )
    elif clusters * FEW > size:
        yield Warn(
            f"sample {size:,} for {clusters:,} clusters: fewer than {FEW} train each; "
            f"raise sample to {clusters * FEW:,} or more"
        )
    wanted = min(size, rows)
    share = wanted / rows
    while True:  # a little more than is wanted, which is then there at once but for one time in thousands
        limit = min(1.0, share + 4 * np.sqrt(share / rows))
        files = yield Shuffle(
            partial(_lowest, column, seed, size, limit),
            partial(_learnt, wanted if limit < 1 else 1, wanted, clusters, seed, iterations, spherical),
            row_bytes=1024,
            columns=(column, "uid"),
            buckets=1,
        )
        count, width = files.summaries[0]
        if count:
            return Centroids(count=count, width=width, files=files)
        if limit == 1:
            return None
        share = 2 * limit


def _lowest(column: str, seed: int, size: int, limit: float, table: pa.Table, buckets: int) -> pa.Table:
    """The m <= size rows with the lowest hashes, of those below this share of all hashes."""
    table = having(table, column)
    hashes = hash64_many(f"{seed}/cluster sample", table["uid"].to_pylist())
    chosen = np.argsort(hashes, kind="stable")[:size]
    chosen = chosen[hashes[chosen] <= np.float64(limit) * 2.0**64] if limit < 1 else chosen
    points = embeddings(table, column)[chosen]
    sent = pa.FixedSizeListArray.from_arrays(pa.array(points.ravel()), points.shape[1])
    return pa.table({"point": sent, "hash": hashes[chosen], "bucket": np.zeros(len(chosen), np.int64)})


def _learnt(
    least: int, size: int, clusters: int, seed: int, iterations: int, spherical: bool, pieces: Iterator[pa.Table]
) -> tuple[pa.Table, tuple[int, int]]:
    """(centroids, their shape) of `size` rows or as many as have come; none where those are fewer than `least`."""
    tables = list(pieces)
    hashes = np.concatenate([table["hash"].to_numpy() for table in tables])
    if len(hashes) < least:
        return pa.table({"row": pa.array([], pa.int64())}), (0, 0)
    wanted = min(size, len(hashes))
    place = np.empty(len(hashes), np.int64)
    place[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
    sample, start = np.zeros((0, 0), np.float32), 0
    for table in tables:  # piece by piece, so that there is one copy of the sample
        points = embeddings(table, "point")
        if not start:
            sample = np.empty((wanted, points.shape[1]), np.float32)
        here = place[start : start + len(points)]
        sample[here[here < wanted]] = points[here < wanted]
        start += len(points)
    centroids = train(sample, clusters, seed, iterations, spherical)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(centroids.ravel()), centroids.shape[1])
    return pa.table({"row": np.arange(len(centroids)), "centroid": lists}), centroids.shape


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


def assigned(column: str, centroids: Centroids, table: pa.Table) -> Leaving:
    """How many rows are in each cluster, int64 [K]; and `cluster`, of each row the nearest one by dot product, int32
    [rows]: -1 without an embedding."""
    inside = table[column].is_valid().to_numpy()
    cluster = np.full(len(inside), -1, np.int32)
    cluster[inside] = nearest(embeddings(having(table, column), column), centroids())
    return Leaving(np.bincount(cluster[inside], minlength=centroids.count), {"cluster": cluster})


def in_clusters(table: pa.Table) -> pa.Table:
    """The rows that have one in `cluster`."""
    inside = pc.greater_equal(table["cluster"], 0)
    return table if pc.all(inside).as_py() else table.filter(inside)


def nearest(points: np.ndarray, centroids: np.ndarray, metric: Metric = "ip") -> np.ndarray:
    """The centroid (float32 [K, D]) with the largest dot product or the smallest L2 distance to each point.

    Args:
        points: [n, D], of any float type.

    Returns:
        int32 [n].
    """
    return Nearest(centroids, metric)(points)
