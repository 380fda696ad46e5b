"""The nearest centroid of every point: by all products, or faster by eight-bit products and exact ones with the best.

`exact` is FAISS's flat search. `fast` takes the products of all centroids in
integers, several times as fast where the processor multiplies bytes (VNNI), and
then the exact product with each that is within the codes' error of the best.
A random rotation first makes all dimensions alike, so that one scale serves
them all and the error of a product is that of many small independent ones,
which is normally distributed: nothing is trained, and whether centroids are
isotropic or lie in clumps only changes how many are looked at twice. A point
with too many of these, as among centroids that lie closer together than codes
can tell, is searched exactly.

A point's answer depends on no other point. All runs on one thread, so that
sums have one order and a worker takes the one processor that it has.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

BLOCK = 4_096  # points that are searched at once
LEAST = 32_768  # centroids; with fewer the exact search is as fast
ROWS, TILE = 512, 4_096  # points and centroids whose products are in memory at once
CANDIDATES = 256  # that are compared exactly, at most
DOUBT = 7.0  # standard deviations of the codes' error that two products may differ by before the lower one is out
POINT_CODE, CENTROID_CODE = (
    127,
    63,
)  # the largest; a sum of two products fits into 16 bits, as processors before VNNI need

Metric = Literal["ip", "l2"]
Precision = Literal["exact", "fast"]


class Nearest:
    """Called with points, gives the centroid with the largest dot product or the smallest L2 distance to each.

    `centroids`: float32 [K, D], or what opens them, once in each process.

    "fast" gives what "exact" gives but for products that float32 cannot tell apart, and has no effect with fewer than
    LEAST centroids, or where PyTorch is built without oneDNN.

    Memory: the centroids; for "fast" a byte a value more, PyTorch, and a second copy while the codes are made, which
    is at the first call in every process.
    """

    def __init__(
        self, centroids: np.ndarray | Callable[[], np.ndarray], metric: Metric = "ip", precision: Precision = "exact"
    ) -> None:
        self._given, self._metric, self._precision = centroids, metric, precision
        self._opened: np.ndarray | None = None
        self._codes: _Codes | None = None

    @property
    def centroids(self) -> np.ndarray:
        if self._opened is None:
            self._opened = self._given if isinstance(self._given, np.ndarray) else self._given()
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_codes": None}  # every process makes its own

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """`points`: [n, D], of any float type. Returns int32 [n]."""
        found = np.empty(len(points), np.int32)
        coded = self._precision == "fast" and len(self.centroids) >= LEAST and _multiplies_bytes()
        with one_thread():
            if coded and self._codes is None:
                self._codes = _Codes(self.centroids, self._metric)
            for start in range(0, len(points), BLOCK):
                block = np.ascontiguousarray(points[start : start + BLOCK], np.float32)
                found[start : start + len(block)] = self._exact(block) if self._codes is None else self._by_codes(block)
        return found

    def _exact(self, points: np.ndarray) -> np.ndarray:
        """int64 [n]"""
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self._metric == "ip" else faiss.METRIC_L2
        return faiss.knn(points, self.centroids, 1, metric)[1][:, 0]

    def _by_codes(self, points: np.ndarray) -> np.ndarray:
        """int64 [n]"""
        faiss: Any = importlib.import_module("faiss")  # whose types do not know what follows
        assert self._codes is not None
        candidates, doubtful = self._codes.candidates(points)
        n, most = candidates.shape
        product = np.empty((n, most), np.float32)  # for the missing ones, -1, the worst there is
        exactly = faiss.fvec_inner_products_by_idx if self._metric == "ip" else faiss.fvec_L2sqr_by_idx
        pointers = (faiss.swig_ptr(array) for array in (product, points, self.centroids, candidates))
        exactly(*pointers, points.shape[1], n, most)
        best = product.max(axis=1) if self._metric == "ip" else product.min(axis=1)
        found = np.where(product == best[:, None], candidates, len(self.centroids)).min(axis=1)
        doubtful |= found == len(self.centroids)  # a point that is not a number
        if doubtful.any():
            found[doubtful] = self._exact(points[doubtful])
        return found


def _multiplies_bytes() -> bool:
    import torch

    return torch.backends.mkldnn.is_available()


class _Codes:
    """The centroids in eight bits a dimension, after centring and a random rotation.

    L2 becomes a dot product by one more dimension: |x - c|^2 is |x|^2 - 2 (x.c - |c|^2 / 2).
    """

    def __init__(self, centroids: np.ndarray, metric: Metric) -> None:
        import torch

        rng = np.random.default_rng(0)
        self._metric = metric
        self._centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        halves = np.empty(len(centroids))
        for start in range(0, len(centroids), BLOCK):
            here = slice(start, start + BLOCK)
            halves[here] = ((centroids[here] - self._centre).astype(np.float64) ** 2).sum(axis=1) / 2
        mean, spread = float(halves.mean()), max(float(centroids.std()), 1e-30)
        self._scale = float(halves.std()) / spread or 1.0  # so that the dimension spreads like the others
        width = centroids.shape[1] + (metric == "l2")
        self._rotation = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
        turned = np.empty((len(centroids), width), np.float32)
        for start in range(0, len(centroids), BLOCK):
            here = slice(start, start + BLOCK)
            turned[here] = self._turned(centroids[here] - self._centre, (mean - halves[here]) / self._scale)
        self._step = max(float(np.abs(turned).max()), 1e-30) / CENTROID_CODE
        codes = np.empty(turned.shape, np.int8)
        for start in range(0, len(centroids), BLOCK):
            codes[start : start + BLOCK] = np.rint(turned[start : start + BLOCK] / self._step)
        self._longest = float(np.sqrt((turned * turned).sum(axis=1).max()))
        self._tiles = [torch.from_numpy(codes[start : start + TILE]).t() for start in range(0, len(codes), TILE)]

    def candidates(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(for each point (float32 [n, D]) the centroids that may be the nearest, ascending, then -1: int64 [n, m];
        whether they are too many, and not all there: bool [n])"""
        extra = np.full(len(points), self._scale, np.float32)
        turned = self._turned(points - self._centre if self._metric == "l2" else points, extra)
        step = np.maximum(np.abs(turned).max(axis=1), 1e-30) / POINT_CODE
        codes = np.rint(turned / step[:, None]).astype(np.int8)
        # Rounding to a step is off by step / sqrt(12), in either factor and independently in every dimension.
        error = np.hypot(np.linalg.norm(turned, axis=1) * self._step, self._longest * step) / np.sqrt(12)
        slack = np.ceil(DOUBT * np.sqrt(2.0) * error / (step * self._step)).astype(np.int32)
        rows, found, doubtful = [], [], np.zeros(len(points), bool)
        for start in range(0, len(points), ROWS):
            here = slice(start, start + ROWS)
            row, centroid, doubtful[here] = self._likely(codes[here], slack[here])
            rows.append(row + start)
            found.append(centroid)
        row, centroid = np.concatenate(rows), np.concatenate(found)
        counts = np.bincount(row, minlength=len(points))
        listed = np.full((len(points), max(int(counts.max()), 1)), -1)
        listed[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)] = centroid
        return listed, doubtful

    def _likely(self, codes: np.ndarray, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(points, centroids: int64 [pairs], by point and centroid; which points have too many: bool [n])"""
        import torch

        asked, less = torch.from_numpy(codes), torch.from_numpy(slack)
        best = torch.full((len(codes),), -(2**31) + 2**30, dtype=torch.int32)
        often = torch.zeros(len(codes), dtype=torch.int64)
        pairs = []
        for number, tile in enumerate(self._tiles):
            products = torch._int_mm(asked, tile)  # int32 [n, TILE]
            highest = products.amax(dim=1)
            best = torch.maximum(best, highest)
            near = torch.nonzero(highest >= best - less)[:, 0]  # few: most tiles have nothing for most points
            row, column = torch.nonzero(products[near] >= (best - less)[near, None], as_tuple=True)
            row = near[row]
            often += torch.bincount(row, minlength=len(codes))
            best[often > CANDIDATES] = 2**31 - 1  # which no product reaches
            pairs.append((row, column + number * TILE, products[row, column]))
        row, column, product = (torch.cat(one) for one in zip(*pairs, strict=True))
        stays = product >= (best - less)[row]
        order = torch.argsort(row[stays], stable=True)
        return row[stays][order].numpy(), column[stays][order].numpy(), (often > CANDIDATES).numpy()

    def _turned(self, values: np.ndarray, extra: np.ndarray) -> np.ndarray:
        if self._metric == "l2":
            values = np.concatenate([values, extra[:, None].astype(np.float32)], axis=1)
        return values @ self._rotation


@contextmanager
def one_thread() -> Iterator[None]:
    """For FAISS and, where it is in use, for PyTorch."""
    import faiss

    torch: Any = sys.modules.get("torch")
    threads = faiss.omp_get_max_threads(), torch.get_num_threads() if torch else 1
    faiss.omp_set_num_threads(1)
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads[0])
        if torch:
            torch.set_num_threads(threads[1])
