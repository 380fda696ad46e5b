"""Clusters as the published code makes them: FAISS called by hand, hashlib and NumPy, nothing of `curation`."""

import hashlib

import faiss
import numpy as np
import pyarrow as pa


def hash64(seed: str, uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{uid}".encode(), digest_size=8).digest(), "little")


def sound(table: pa.Table, column: str = "embedding") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(row, embedding float64 as stored, uid) of each row without an error"""
    valid = np.flatnonzero([error is None for error in table["error"].to_pylist()])
    found = table.take(pa.array(valid))
    return valid, np.array(found[column].to_pylist(), np.float64), found["uid"].to_pylist()


def centroids(points: np.ndarray, uids: list[str], *, clusters: int, sample: int, seed: int) -> np.ndarray:
    """Spherical k-means, 20 iterations, over the `sample` rows of the lowest hash(seed, uid): float64 [clusters, D]."""
    lowest = sorted(range(len(uids)), key=lambda i: hash64(f"{seed}/cluster sample", uids[i]))[:sample]
    kmeans = faiss.Kmeans(
        points.shape[1], clusters, niter=20, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=len(lowest),
    )  # fmt: skip
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    kmeans.train(points[lowest].astype(np.float32))
    faiss.omp_set_num_threads(threads)
    return kmeans.centroids.astype(np.float64)
