"""The nearest centroid: exact against NumPy's products; fast against exact, where codes serve and where they cannot."""

import pickle
from typing import Literal

import numpy as np
import pytest

from curation.selection.nearest import LEAST, Nearest

WIDTH = 257  # odd, so that codes of two dimensions need one more
Metric = Literal["ip", "l2"]


def clusters(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(centroids float32 [LEAST, WIDTH], points float16 [1500, WIDTH])"""
    rng = np.random.default_rng(0)

    def noise(n: int) -> np.ndarray:
        return rng.standard_normal((n, WIDTH))

    if kind == "isotropic":
        centroids, points = noise(LEAST), noise(1500)
    elif kind == "clustered":
        centroids = 2 * noise(100)[rng.integers(0, 100, LEAST)] + noise(LEAST)
        points = centroids[rng.integers(0, LEAST, 1500)] + 0.3 * noise(1500)
    else:  # many centroids so close together that their codes are the same
        centroids = noise(8)[rng.integers(0, 8, LEAST)] + 0.03 * noise(LEAST)
        points = centroids[rng.integers(0, LEAST, 1500)] + 0.003 * noise(1500)
    return centroids.astype(np.float32), points.astype(np.float16)


def likeness(points: np.ndarray, centroids: np.ndarray, metric: Metric) -> np.ndarray:
    """Of every point and centroid, in float64."""
    products = points.astype(np.float64) @ centroids.T.astype(np.float64)
    return products - (metric == "l2") * (centroids.astype(np.float64) ** 2).sum(axis=1) / 2


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", ["isotropic", "clustered", "close"])
def test_exact_and_fast_against_numpy(kind: str, metric: Metric) -> None:
    centroids, points = clusters(kind)
    like = likeness(points, centroids, metric)
    best = like.max(axis=1)
    exact = Nearest(centroids, metric)(points)
    fast = Nearest(centroids, metric, "fast")
    found = fast(points)
    assert exact.dtype == found.dtype == np.int32
    assert (best - like[np.arange(len(points)), exact] <= 1e-6 * np.abs(like).max(axis=1)).all(), "but for rounding"
    assert (found == exact).mean() >= 0.999
    parts = [fast(points[:1]), fast(points[1:400]), fast(points[400:])]
    assert (np.concatenate(parts) == found).mean() >= 0.999, "a point's answer is its own"
    assert (pickle.loads(pickle.dumps(fast))(points[:300]) == found[:300]).all()


def test_fast_takes_the_first_of_equal_centroids_and_needs_many() -> None:
    centroids, points = clusters("isotropic")
    twice = np.concatenate([centroids, centroids])
    assert (Nearest(twice, "ip", "fast")(points) < LEAST).all()
    few = centroids[:100]
    assert (Nearest(few, "l2", "fast")(points) == Nearest(few, "l2")(points)).all()
    assert Nearest(twice)(points[:0]).shape == (0,)
