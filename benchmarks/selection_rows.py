"""Selection by columns: filters and exact duplicates, each against the way its source does it.

Both sides of the filters read their columns and decide which rows stay: ours by
the selection engine, with every selector's verdict on every row, DataComp's by
functions that are applied to a frame; what either writes afterwards (a ledger,
a list of uids) is left out. Of duplicates, ours is the whole select phase with
its ledger. The signals are synthetic: but for one, no picture is behind them.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.building_rows import noise_pool
from benchmarks.case import Bench, Case
from benchmarks.curation_rows import CORES, run_of
from curation import phases
from curation.manifest import write_manifest
from curation.selection import engine
from curation.selection.engine import partitions
from curation.selection.threshold import Threshold
from curation.store import BASE
from curation.tar import BLOCK, members
from curation.workers import Workers

WORDS = ("a", "photo", "of", "the", "old", "red", "car", "near", "two", "trees", "in", "front", "my", "house", "with")

BASIC: dict[str, Any] = {
    "words": Threshold(column="caption_words", min=3),
    "chars": Threshold(column="caption_chars", min=6),
    "size": Threshold(column="min_side", min=200),
    "aspect": Threshold(column="aspect", max=3.0),
}


def filtering(bench: Bench) -> Iterator[Case]:
    """DataComp's basic filter without its language, and copies of equal pictures."""
    parts, rows = (2, 500) if bench.quick else (20, 10_000)
    out, metadata = bench.work / "out", bench.work / "metadata"
    pool = bench.work / "pool"
    noise_pool(pool, shards=1, samples=1)  # the one picture that the page of a selection can show
    files = _write_pool(pool, out, metadata, parts, rows)
    fresh = count()
    with Workers(CORES, None) as workers:

        def select(selectors: dict[str, Any]) -> float:
            signals = {name: {"kind": name} for name in ("text", "image", "fingerprints")}
            recipe = {"signals": signals, "selectors": selectors, "seed": next(fresh)}
            return phases.select(run_of(recipe, pool, out, out / "signals", workers))["pairs_per_s"]

        measured = partitions(phases.recorded_parts(out) or [])

        def verdicts() -> float:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                engine.run(BASIC, measured, Path(folder))
            return parts * rows / (time.perf_counter() - began)

        shared: dict[str, Any] = {"area": "curation", "unit": "rows/s", "better": "higher"}
        yield Case(
            name="filters",
            reach=20.0,
            peer_name="DataComp's loop: of each metadata file a pandas frame, functions applied to each row",
            ours=verdicts,
            peer=lambda: _applied(files),
            **shared,
        )
        yield Case(
            name="exact_dedup",
            reach=50.0,
            peer_name="Data-Juicer's way: for each sample, one call of a Ray actor that holds the set, awaited",
            ours=lambda: select({"copies": {"kind": "exact_duplicates"}}),
            peer=lambda: _asked_one_by_one(workers, files, 200 if bench.quick else 3_000),
            **shared,
        )


def _write_pool(pool: Path, out: Path, metadata: Path, parts: int, rows: int) -> list[Path]:
    """The same synthetic rows twice: as a finished measure in `out`, and as metadata files in DataComp's columns."""
    rng = np.random.default_rng(0)
    shard = str(pool / "00000.tar")
    size = next(members(Path(shard).read_bytes())).size
    folder = out / "signals" / "synthetic"
    folder.mkdir(parents=True)
    metadata.mkdir()
    files = []
    for part in range(parts):
        lengths = rng.integers(1, 24, rows)
        captions = [" ".join(words) for words in np.split(rng.choice(WORDS, lengths.sum()), np.cumsum(lengths)[:-1])]
        width, height = rng.integers(64, 1_024, (2, rows))
        uids = [rng.bytes(16).hex() for _ in range(rows)]
        sha256 = [f"{n:064x}" for n in rng.integers(0, parts * rows, rows)]  # a third are copies
        base = {
            "uid": uids, "shard": [shard] * rows, "key": uids, "index": np.arange(rows, dtype=np.int32),
            "extensions": [["jpg"]] * rows, "offsets": [[BLOCK]] * rows, "sizes": [[size]] * rows,
            "error": [None] * rows, "caption": captions, "url": [f"https://example.org/{uid}" for uid in uids],
        }  # fmt: skip
        table = pa.table(base, schema=BASE)
        signals = {
            "caption_chars": np.array([len(c) for c in captions], np.int32),
            "caption_words": lengths.astype(np.int32),
            "width": width.astype(np.int32),
            "height": height.astype(np.int32),
            "min_side": np.minimum(width, height).astype(np.int32),
            "aspect": (np.maximum(width, height) / np.minimum(width, height)).astype(np.float32),
            "image_sha256": pa.array([bytes.fromhex(digest) for digest in sha256], pa.binary(32)),
        }
        for name, values in signals.items():
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, folder / f"{part:016x}-00000.parquet", compression="zstd")
        files.append(metadata / f"{part:032x}.parquet")
        datacomp = {
            "uid": uids, "url": base["url"], "text": captions, "original_width": width, "original_height": height,
            "sha256": sha256,
        }  # fmt: skip
        pq.write_table(pa.table(datacomp), files[-1])
    write_manifest(
        out / "measure.manifest.json",
        {
            "phase": "measure",
            "seen": parts * rows,
            "errors": {},
            "measured": 0,
            "wall_s": 0.0,
            "ray_start_s": 0.0,
            "pairs_per_s": 0.0,
            "signal_set": "signals/synthetic",
            "parts": sorted(p.name for p in folder.iterdir()),
            "rows": [rows] * parts,
        },
    )
    return files


def _applied(files: Sequence[Path]) -> float:
    """DataComp's basic filter without the language: rows a second until it is known which stay."""
    import pandas as pd

    began, rows, kept = time.perf_counter(), 0, []
    for file in files:
        frame = pd.read_parquet(file, columns=["uid", "text", "original_width", "original_height"])
        words = frame.text.apply(lambda text: len(text.split()))
        chars = frame.text.apply(lambda text: len(text))
        short = np.minimum(frame.original_width, frame.original_height)
        long = np.maximum(frame.original_width, frame.original_height)
        kept.append((words > 2) & (chars > 5) & (short >= 200) & (long / short <= 3.0))
        rows += len(frame)
    return rows / (time.perf_counter() - began)


class _Seen:
    def __init__(self) -> None:
        self._hashes: set[str] = set()

    def is_new(self, value: str) -> bool:
        new = value not in self._hashes
        self._hashes.add(value)
        return new


def _asked_one_by_one(workers: Workers, files: Sequence[Path], samples: int) -> float:
    """So many samples, for which the driver waits one after the other. Samples a second."""
    import ray

    for _ in workers.map(lambda: lambda item: item, [None]):  # which starts Ray
        pass
    actor: Any = ray.remote(num_cpus=0)(_Seen).remote()
    ray.get(actor.is_new.remote(""))
    hashes = pq.read_table(files[0], columns=["sha256"])["sha256"].to_pylist()
    hashes = [f"{hashes[i % len(hashes)]}{i // len(hashes)}" for i in range(samples)]
    began = time.perf_counter()
    kept = [value for value in hashes if ray.get(actor.is_new.remote(value))]
    speed = len(hashes) / (time.perf_counter() - began)
    assert len(kept) == len(set(hashes))
    ray.kill(actor)
    return speed
