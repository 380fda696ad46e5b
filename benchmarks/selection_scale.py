"""Selection at two sizes: memory of the driver and of the workers, and time, as the pool grows.

    python -m benchmarks.selection_scale --work FOLDER                    columns: 1.28 and 12.8 million rows; 8 GB
    python -m benchmarks.selection_scale --work FOLDER --kind embeddings  0.3 and 1.2 million, of width 256; 2 GB
    python -m benchmarks.selection_scale --work FOLDER --rows 2800000     a tenth (or a quarter) and all of so many

The signals are made up, the selection is `phases.select` as `gemsmith curate`
calls it, on Ray with a worker for each core. Memory is each process's highest
resident size by the kernel's count (VmHWM), maps of files included. Brings its
kind into benchmarks/results/selection_scale.json, each figure with its reach and
whether it is in it, and into the costs in docs/curation.md, and prints it. Pools of less than four partitions are
selected from without workers, so smaller sizes show nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import cost, pages
from benchmarks.case import LATEST
from benchmarks.run import device
from curation import phases
from curation.config import CurateConfig
from curation.manifest import SCHEMA_VERSION, write_json, write_manifest
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.concept_balance import ConceptBalance
from curation.selection.decontamination import Decontamination
from curation.selection.engine import PARTITION_ROWS
from curation.selection.exact_duplicates import ExactDuplicates
from curation.selection.fraction import Fraction
from curation.selection.fusion import ScoreFusion
from curation.selection.image_based import ImageBased
from curation.selection.language import LanguageIs
from curation.selection.near_duplicates import NearDuplicates
from curation.selection.semantic_duplicates import SemanticDuplicates
from curation.selection.threshold import Threshold
from curation.selection.uids import Uids
from curation.store import BASE
from curation.workers import Workers

PART_ROWS = 1_000  # the default unit of a measurement
REFERENCE_ROWS = 2_000  # the first ones of the pool
CONCEPTS = 20_000
RESULTS = Path(__file__).parent / "results" / "selection_scale.json"
REACHES = {"driver_mib": 600.0, "driver_growth": 1.1, "worker_growth": 1.15, "time_growth_over_rows": 1.2}
"""At most so much: the driver at either size; a worker has its partition and what allocators round up."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`rows` and a `times`-th of them, with embeddings of `width`."""

    rows: int
    times: int
    width: int
    selectors: Callable[[Path, int], dict[str, Any]]


def _of_columns(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "language": LanguageIs(languages=["en"]),
        "words": Threshold(column="caption_words", min=3),
        "clip_score": Fraction(column="clip_score", fraction=0.6),
        "fused": ScoreFusion(weights={"clip_score": 0.5, "other_score": 0.5}, fraction=0.7),
        "exact_duplicates": ExactDuplicates(),
        "near_duplicates": NearDuplicates(distance=4),
        "concepts": ConceptBalance(tail_share=0.3),
        "balance": ClusterBalance(clusters=100, cap_quantile=0.9),
    }


def _of_embeddings(folder: Path, rows: int) -> dict[str, Any]:
    """Those that hold most: embeddings, a sample of them, a reference, a list as long as half of the pool."""
    return {
        "listed": Uids(file=str(folder / "subset.npy")),
        "decontaminated": Decontamination(reference=str(folder / "reference"), cosine=0.95),
        "image_based": ImageBased(reference=str(folder / "reference.npy"), clusters=200, sample=20_000, iterations=5),
        "semantic": SemanticDuplicates(clusters=rows // 2_000, eps=0.05, sample=20_000, iterations=5),
    }


KINDS = {
    # Few dimensions, so that the time is the selection's and not that of long dot products.
    "columns": Kind(rows=12_800_000, times=10, width=32, selectors=_of_columns),
    "embeddings": Kind(rows=1_200_000, times=4, width=256, selectors=_of_embeddings),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_scale", allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the signals, which are kept")
    parser.add_argument("--kind", choices=KINDS, default="columns")
    parser.add_argument("--rows", type=int, help="default: the kind's own")
    parser.add_argument("--one", action="store_true", help="one size, in this process: prints its figures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    kind = KINDS[a.kind]
    most = a.rows or kind.rows
    if a.one:
        print(json.dumps(select(a.work, kind.selectors(a.work, most))))
        return 0
    sizes = {}
    for rows in (most // kind.times, most):
        command = [sys.executable, "-m", "benchmarks.selection_scale", "--one", "--kind", a.kind, "--rows", str(rows)]
        folder = a.work / a.kind / str(rows)
        if not (folder / "measure.manifest.json").exists():
            make_references(folder, kind.width, rows)
            make_signals(folder, rows, kind.width)
        done = subprocess.run([*command, "--work", str(folder)], stdout=subprocess.PIPE, text=True, check=True)
        sizes[str(rows)] = json.loads(done.stdout.splitlines()[-1])
        print(rows, sizes[str(rows)], file=sys.stderr, flush=True)
    kinds = json.loads(a.out.read_text())["kinds"] if a.out.exists() else {}
    kinds[a.kind] = {
        "sizes": sizes,
        "figures": figures(sizes, kind.times),
        "partition_rows": PARTITION_ROWS,
        "device": device(),
        "command": f"python -m benchmarks.selection_scale --work FOLDER --kind {a.kind}",
    }
    write_json(
        a.out, {"schema_version": SCHEMA_VERSION, "kinds": {name: kinds[name] for name in KINDS if name in kinds}}
    )
    if a.out == RESULTS:
        pages.put(pages.DOCS / "curation.md", "benchmarks.cost", cost.table(cost.read(LATEST), cost.PAIRS))
    print(json.dumps(kinds[a.kind], indent=1))
    return 0


def figures(sizes: dict[str, dict[str, Any]], times: int) -> dict[str, dict[str, Any]]:
    """By name {"value", "reach", "passed"}, of a size and one of so many times the rows."""
    small, large = sizes.values()
    values = {
        "driver_mib": max(small["driver_mib"], large["driver_mib"]),
        "driver_growth": large["driver_mib"] / small["driver_mib"],
        "worker_growth": large["worker_mib"] / small["worker_mib"],
        "time_growth_over_rows": large["wall_s"] / small["wall_s"] / times,
    }
    return {
        name: {"value": round(value, 4), "reach": REACHES[name], "passed": value <= REACHES[name]}
        for name, value in values.items()
    }


def make_references(folder: Path, width: int, rows: int) -> None:
    """What selectors read beside the pool: a measured reference, a few embeddings, and every second uid of the pool."""
    make_signals(folder / "reference", REFERENCE_ROWS, width)
    table = _part(0, 0, PART_ROWS, width)
    points = table["clip_image_embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    np.save(folder / "reference.npy", points.reshape(-1, width)[:100])
    numbers = [np.frombuffer(_uids(n), ">u8").astype("u8").reshape(-1, 2)[::2] for n in range(rows // PART_ROWS)]
    np.save(folder / "subset.npy", np.sort(np.concatenate(numbers).reshape(-1).view("u8,u8")))


def _uids(number: int) -> bytes:
    """Of a part, 16 bytes each."""
    return np.random.default_rng([number, 1]).bytes(16 * PART_ROWS)


def make_signals(folder: Path, rows: int, width: int) -> None:
    """A finished measure of a pool with one pair in ten an exact copy, as many near ones, and equal embeddings."""
    names = []
    for number, first in enumerate(range(0, rows, PART_ROWS)):
        name = f"{number // 10:016x}-{number % 10:05d}.parquet"
        (folder / "signals" / "set").mkdir(parents=True, exist_ok=True)
        pq.write_table(_part(number, first, min(PART_ROWS, rows - first), width), folder / "signals" / "set" / name)
        names.append(name)
    sizes = [min(PART_ROWS, rows - first) for first in range(0, rows, PART_ROWS)]
    speed = {"wall_s": 0.0, "ray_start_s": 0.0, "pairs_per_s": 0.0}
    manifest = {"phase": "measure", "seen": rows, "signal_set": "signals/set", "parts": names, "rows": sizes, **speed}
    write_manifest(folder / "measure.manifest.json", manifest)


def _part(number: int, first: int, rows: int, width: int) -> pa.Table:
    rng = np.random.default_rng(number)
    own, other, draw = first + np.arange(rows), rng.integers(0, first + rows, rows), rng.random(rows)
    content, look = np.where(draw < 0.1, other, own), np.where(draw < 0.2, other, own)
    flipped = np.where((draw >= 0.1) & (draw < 0.2), np.uint64(1) << rng.integers(0, 64, rows, np.uint64), np.uint64(0))
    phash = (look.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(0x5851F42D4C957F2D)) ^ flipped
    hexadecimal = _uids(number)[: 16 * rows].hex().encode()
    points = rng.normal(size=(rows, width)).astype(np.float32) + rng.normal(size=(10, width))[rng.integers(0, 10, rows)]
    points[2::20] = points[:-2:20]  # of the even rows, whose uids are on the list
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    named = np.minimum(rng.zipf(1.3, 4 * rows), CONCEPTS) - 1
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 8, rows))]).clip(max=4 * rows).astype(np.int32)
    columns: dict[str, Any] = {
        "uid": pa.Array.from_buffers(
            pa.string(), rows, [None, pa.py_buffer(32 * np.arange(rows + 1, dtype=np.int32)), pa.py_buffer(hexadecimal)]
        ),
        "shard": pa.repeat(f"{number // 10:08d}.tar", rows),
        "key": pa.array([f"{first + i:012d}" for i in range(rows)]),
        "index": pa.array(np.arange(rows, dtype=np.int32)),
        "language": pa.array(np.where(rng.random(rows) < 0.5, "en", "de")),
        "language_probability": pa.array(rng.random(rows, np.float32)),
        "caption_words": pa.array(rng.integers(1, 20, rows, np.int32)),
        "clip_score": pa.array(rng.normal(0.25, 0.05, rows).astype(np.float32)),
        "other_score": pa.array(rng.normal(0.5, 0.2, rows).astype(np.float32)),
        "image_sha256": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), rows, [None, pa.py_buffer(np.repeat(content, 4).tobytes())]
        ),
        "phash": pa.array(phash),
        "concepts": pa.ListArray.from_arrays(pa.array(offsets), pa.array(named.astype(np.int32))),
        "clip_image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(points.astype(np.float16).ravel()), width),
    }
    for field in BASE:
        columns.setdefault(field.name, pa.nulls(rows, field.type))
    return pa.table(columns)


def select(folder: Path, selectors: dict[str, Any]) -> dict[str, Any]:
    """{"wall_s", "driver_mib", "worker_mib", "kept", "dropped"} of one selection over the signals in `folder`."""
    cores = len(os.sched_getaffinity(0))
    config = CurateConfig(signals={}, selectors=selectors)
    with Workers(cores, None) as workers:
        run = phases.Run(
            config=config, pool=[], out=folder, root=folder / "signals", slice=None, workers=workers, identity={},
            read={},
        )  # fmt: skip
        watched = _Watch()
        began = time.perf_counter()
        done = phases.select(run)
        wall = time.perf_counter() - began
        return {
            "wall_s": round(wall - workers.start_seconds, 2),
            "driver_mib": round(_highest(os.getpid()) / 2**20, 1),
            "worker_mib": round(watched.stop() / 2**20, 1),
            "kept": done["kept"],
            "dropped": done["dropped"],
        }


def _highest(process: int) -> int:
    """The most bytes that this process has had resident, 0 where it is gone.

    Not `getrusage`, which counts what the process was before it became this program: a copy of the one that made the
    signals.
    """
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class _Watch:
    """The highest resident size that any worker has reached, bytes: asked five times a second, since they may end."""

    def __init__(self) -> None:
        self._highest, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self._highest

    def _watch(self) -> None:
        while not self._end.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        self._highest = max(self._highest, _highest(process.pid))
                except psutil.NoSuchProcess:
                    continue


if __name__ == "__main__":
    sys.exit(main())
