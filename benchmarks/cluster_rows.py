"""Clusters: semantic duplicates within one, and the nearest of many centroids, each against the plain matrix.

What is compared is what does the work: the pure functions that the selectors
call, on as many threads as what they are compared with. The matrix of the
semantic duplicates takes 10 GB.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Bench, Case
from curation.selection.nearest import LEAST, Nearest, one_thread
from curation.selection.semantic_duplicates import keep_distinct

EPS = 0.05
CLUSTER = 50_000  # rows of the one that is compared
ROOT = Path(__file__).resolve().parent.parent


def clusters(bench: Bench) -> Iterator[Case]:
    """Semantic duplicates within one cluster, and the nearest of DataComp's 100,000 centroids."""
    rows = 1_000 if bench.quick else CLUSTER
    points = _copies(rows, 512)
    yield Case(
        name="semantic_dedup",
        area="curation",
        unit="s",
        better="lower",
        reach=1.0,
        peer_name=f"SemDeDup's way: the whole matrix of {rows:,} x {rows:,} cosines, its upper half, its greatest",
        ours=lambda: _timed(lambda: keep_distinct(points, EPS, "semdedup")),
        peer=lambda: _timed(lambda: _all_with_all(points)),
    )
    yield Case(
        name="semantic_dedup_memory",
        area="curation",
        unit="MiB",
        better="lower",
        # Of a CLUSTER the matrix takes 9,537 MiB, so this is 1 GiB for a whole process of ours.
        reach=1_024 / (CLUSTER**2 * 4 / 2**20),
        peer_name=f"the matrix of {rows:,} x {rows:,} cosines in float32, by its size; ours is all of a process",
        ours=lambda: _memory_of_distinct(rows),
        peer=lambda: rows**2 * 4 / 2**20,
    )

    count, asked = (LEAST, 256) if bench.quick else (100_000, 4_096)
    for kind in ("isotropic", "clustered"):
        centroids, pictures = _centroids(kind, count, asked)
        exact, fast = Nearest(centroids), Nearest(centroids, "ip", "fast")
        bare = _bare_index(centroids)
        found = bare(pictures)
        agreement = float((fast(pictures) == found).mean())
        assert (exact(pictures) == found).mean() >= 0.999 and agreement >= 0.999, (kind, agreement)
        shared: dict[str, Any] = {"area": "curation", "unit": "points/s", "better": "higher"}
        shared["peer"] = partial(_speed, bare, pictures)
        setting = f"faiss IndexFlatIP on one thread as ours, {count:,} centroids x 768, {kind}"
        if kind == "isotropic":
            yield Case(
                name="assign_exact",
                reach=0.9,
                peer_name=setting,
                ours=partial(_speed, exact, pictures),
                **shared,
            )
        yield Case(
            name=f"assign_fast_{kind}",
            reach=2.0,
            peer_name=f"{setting}; {agreement:.2%} of ours agree",
            ours=partial(_speed, fast, pictures),
            **shared,
        )
        del exact, fast, bare, centroids


def _speed(nearest: Callable[[np.ndarray], np.ndarray], points: np.ndarray) -> float:
    """Points a second."""
    return len(points) / _timed(lambda: nearest(points))


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _units(points: np.ndarray) -> np.ndarray:
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def _copies(rows: int, width: int) -> np.ndarray:
    """Unit rows in no direction, one in twenty a copy of another: few fall out early, which is ours' worst case."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((rows, width), np.float32)
    copies = rng.choice(rows, rows // 20, replace=False)
    points[copies] = points[rng.integers(0, rows, len(copies))]
    return _units(points)


def _all_with_all(points: np.ndarray) -> Any:
    """Which rows have no earlier one within EPS: bool [n]."""
    import torch

    x = torch.from_numpy(points)
    cosines = (x @ x.T).triu_(diagonal=1)
    return cosines.max(dim=0).values <= 1 - EPS


def _memory_of_distinct(rows: int) -> float:
    """The peak of a process that finds the duplicates among so many rows of width 512, in MiB (getrusage's would begin
    at its parent's)."""
    code = (
        "import benchmarks.cluster_rows as rows\n"
        f"rows.keep_distinct(rows._copies({rows}, 512), rows.EPS, 'semdedup')\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def _centroids(kind: str, count: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """(centroids float32 [count, 768], points float16 [points, 768]), all of norm 1.

    Clustered: a hundred centroids around each of some hubs, and points around centroids.
    """
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((count, 768), np.float32)
    asked = rng.standard_normal((points, 768), np.float32)
    if kind == "clustered":
        hubs = rng.standard_normal((count // 100, 768), np.float32)
        centroids = hubs[rng.integers(0, len(hubs), count)] + 0.7 * centroids
        asked = centroids[rng.integers(0, count, points)] + 0.7 * asked
    return _units(centroids), _units(asked).astype(np.float16)


def _bare_index(centroids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)

    def search(points: np.ndarray) -> np.ndarray:
        with one_thread():
            return index.search(points.astype(np.float32), 1)[1][:, 0]

    return search
