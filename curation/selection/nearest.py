"""The nearest centroid of every point: by all products, or faster by four-bit codes and exact products with the best.

`exact` is FAISS's flat search. `fast` looks at all centroids through codes of
two bits a dimension (product quantisation, Jégou et al. 2011, scanned in
registers: André et al. 2015), and then computes the exact product of a point
with the CANDIDATES best. A random rotation first makes every pair of dimensions
alike, so that one codebook of sixteen serves them all, whatever the data, and
nothing but that has to be trained. Where the last candidate looks about as good
as the winner, as among centroids that lie closer together than the codes can
tell, the point is searched exactly.

A point's answer depends on no other point. FAISS runs on one thread, so that
sums have one order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

BLOCK = 4_096  # points that are searched at once
LEAST = 32_768  # centroids; with fewer the exact search is as fast
CANDIDATES = 224
DOUBT = 1.0  # standard deviations of the codes' error between winner and last candidate that leave no doubt
BATCHES = 0x222  # points that FAISS scans together, in hexadecimal digits: a fifth faster than its own choice

Metric = Literal["ip", "l2"]
Precision = Literal["exact", "fast"]


class Nearest:
    """Called with points, gives the centroid with the largest dot product or the smallest L2 distance to each.

    "fast" agrees with "exact" on at least 99.9 % of points of some hundred dimensions, as embeddings of pictures have,
    and has no effect with fewer than LEAST centroids.

    Memory: the centroids (float32 [K, D]) twice; for "fast" a quarter of a byte a value more, and a third copy while
    the codes are made, which is at the first call in every process.
    """

    def __init__(self, centroids: np.ndarray, metric: Metric = "ip", precision: Precision = "exact") -> None:
        self._centroids = centroids
        self._metric = metric
        self._fast = precision == "fast" and len(centroids) >= LEAST
        self._flat: Any = None
        self._codes: _Codes | None = None

    def __len__(self) -> int:
        return len(self._centroids)

    @property
    def width(self) -> int:
        return self._centroids.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flat": None, "_codes": None}  # every process makes its own

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """`points`: [n, D], of any float type. Returns int32 [n]."""
        import faiss

        found = np.empty(len(points), np.int32)
        doubtful = np.ones(len(points), bool)
        with one_thread():
            if self._flat is None:
                self._flat = (faiss.IndexFlatIP if self._metric == "ip" else faiss.IndexFlatL2)(self.width)
                self._flat.add(self._centroids)
                self._codes = _Codes(self._centroids, self._metric) if self._fast else None
            if self._codes is not None:
                for start in range(0, len(points), BLOCK):
                    here = slice(start, start + BLOCK)
                    found[here], doubtful[here] = self._by_codes(self._codes, points[here].astype(np.float32))
            left = np.flatnonzero(doubtful)
            for start in range(0, len(left), BLOCK):
                these = left[start : start + BLOCK]
                found[these] = self._flat.search(points[these].astype(np.float32), 1)[1][:, 0]
        return found

    def _by_codes(self, codes: "_Codes", points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the best candidate int64 [n], whether that is in doubt bool [n])"""
        import faiss

        likeness, candidates, error = codes.best(points)
        exact = np.empty(candidates.shape, np.float32)
        self._flat.compute_distance_subset(
            len(points), faiss.swig_ptr(points), CANDIDATES, faiss.swig_ptr(exact), faiss.swig_ptr(candidates)
        )
        if self._metric == "l2":
            exact *= -1
        first = np.where(exact == exact.max(axis=1, keepdims=True), candidates, len(self))
        row, place = np.arange(len(points)), first.argmin(axis=1)
        return first[row, place], likeness[row, place] - likeness[:, -1] < DOUBT * error


class _Codes:
    """The centroids in four bits for two dimensions each, after centring and a random rotation.

    L2 becomes a dot product by one more dimension: |x - c|^2 is |x|^2 - 2 (x.c - |c|^2 / 2).
    """

    def __init__(self, centroids: np.ndarray, metric: Metric) -> None:
        import faiss

        rng = np.random.default_rng(0)
        self._metric = metric
        self._centre = centroids.mean(axis=0, dtype=np.float64)
        halves = ((centroids - self._centre) ** 2).sum(axis=1) / 2  # float64 [K]
        self._mean = float(halves.mean())
        self._scale = float(halves.std() / max(centroids.std(), 1e-30)) or 1.0  # the dimension spreads like the others
        width = centroids.shape[1] + (metric == "l2")
        self._width = width + width % 2
        self._rotation = np.linalg.qr(rng.standard_normal((self._width, self._width)))[0]
        turned = np.empty((len(centroids), self._width), np.float32)
        for start in range(0, len(centroids), BLOCK):
            here = slice(start, start + BLOCK)
            turned[here] = self._turned(centroids[here] - self._centre, (self._mean - halves[here]) / self._scale)

        pairs = turned[rng.choice(len(centroids), 256, replace=False)].reshape(-1, 2)
        kmeans = faiss.Kmeans(2, 16, niter=25, seed=1, max_points_per_centroid=len(pairs))
        kmeans.train(pairs)
        self._deviation = float(np.sqrt(kmeans.index.search(pairs, 1)[0].mean() / 2))  # of one value from its code
        codebook: Any = kmeans.centroids  # float32 [16, 2]
        self._index = faiss.IndexPQFastScan(self._width, self._width // 2, 4, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(np.tile(codebook.reshape(-1), self._width // 2), self._index.pq.centroids)
        self._index.is_trained = True
        self._index.add(turned)
        self._index.implem, self._index.qbs = 13, BATCHES

    def best(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(likeness float32 [n, CANDIDATES] descending, centroids int64 [n, CANDIDATES], the standard deviation of
        the difference of two likenesses float [n])."""
        if self._metric == "ip":
            turned = self._turned(points.astype(np.float64), np.zeros(len(points)))
        else:
            turned = self._turned(points - self._centre, np.full(len(points), self._scale))
        likeness, found = self._index.search(turned, CANDIDATES)
        return likeness, found, np.sqrt(2.0) * self._deviation * np.linalg.norm(turned, axis=1)

    def _turned(self, values: np.ndarray, extra: np.ndarray) -> np.ndarray:
        """In float64, so that what is rounded to float32 does not hang on how many points come together."""
        row = np.zeros((len(values), self._width))
        row[:, : values.shape[1]] = values
        if self._metric == "l2":
            row[:, values.shape[1]] = extra
        return (row @ self._rotation).astype(np.float32)


@contextmanager
def one_thread() -> Iterator[None]:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
