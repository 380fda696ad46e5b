"""The build against a raw copy of the pool's files, and against webdataset's reader and writer.

Members of 30 KB, everything in the page cache, nothing synced, four input
shards of 10,000 samples, as img2dataset and DataComp write them, and recipes at
their defaults.
"""

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Bench, Case
from benchmarks.curation_rows import CORES, run_of
from curation import phases, tar
from curation.workers import Workers

SHARDS, SAMPLES = 4, 10_000  # of the pool


def building(bench: Bench) -> Iterator[Case]:
    pool = bench.work / "pool"
    noise_pool(pool, shards=4 if bench.quick else SHARDS, samples=50 if bench.quick else SAMPLES)
    tars, copies = sorted(pool.glob("*.tar")), bench.work / "copies"
    copies.mkdir()

    def copy() -> float:
        began = time.perf_counter()
        for path in tars:
            shutil.copyfile(path, copies / path.name)
        spent = time.perf_counter() - began
        for path in tars:
            (copies / path.name).unlink()
        return spent

    def tarwriter() -> float:
        import webdataset

        began = time.perf_counter()
        urls = [str(path) for path in tars]
        pattern = str(copies / "%08d.tar")
        with webdataset.ShardWriter(pattern, maxcount=10_000, encoder=False, verbose=0) as sink:
            for sample in webdataset.WebDataset(urls, shardshuffle=False):
                sink.write(sample)
        spent = time.perf_counter() - began
        for path in copies.iterdir():
            path.unlink()
        return spent

    with Workers(CORES, None) as workers:

        def selected(name: str, selectors: dict[str, Any]) -> phases.Run:
            recipe = {"signals": {"text": {"kind": "text"}}, "selectors": selectors}
            run = run_of(recipe, pool, bench.work / name, bench.work / "signals", workers)
            phases.measure(run)
            phases.select(run)
            return run

        def build(run: phases.Run) -> float:
            shutil.rmtree(run.out / "shards", ignore_errors=True)
            (run.out / "build.manifest.json").unlink(missing_ok=True)
            began = time.perf_counter()
            phases.build(run)
            return time.perf_counter() - began

        everything = selected("all", {})
        fifth = selected("fifth", {"long": {"kind": "threshold", "column": "caption_chars", "min": 100}})
        shared: dict[str, Any] = {"area": "curation", "unit": "s", "better": "lower"}
        copying = "raw copy of the pool's tars (shutil.copyfile)"
        yield Case(
            name="build_keep_1.0", reach=2.0, peer_name=copying, ours=lambda: build(everything), peer=copy, **shared
        )
        yield Case(name="build_keep_0.2", reach=0.8, peer_name=copying, ours=lambda: build(fifth), peer=copy, **shared)
        yield Case(
            name="build_tarwriter",
            reach=0.2,
            peer_name="webdataset read + ShardWriter",
            ours=lambda: build(everything),
            peer=tarwriter,
            **shared,
        )


def noise_pool(folder: Path, *, shards: int, samples: int) -> None:
    """Pictures of noise, 30 KB each; one caption in five has 100 characters or more."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(32):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (204, 204, 3), np.uint8)).save(buffer, "JPEG", quality=80)
        pictures.append(buffer.getvalue())
    for shard in range(shards):
        parts: list[bytes] = []
        for n in range(shard * samples, (shard + 1) * samples):
            caption = "x" * (120 if n % 5 == 0 else 60)
            record = {"uid": f"{n:032x}", "caption": caption, "url": f"https://example.org/{n}.jpg"}
            members = {
                "jpg": pictures[n % len(pictures)], "txt": caption.encode(), "json": json.dumps(record).encode(),
            }  # fmt: skip
            for extension, payload in members.items():
                padding = bytes(tar.padded(len(payload)) - len(payload))
                parts += [tar.header(f"{n:09d}.{extension}", len(payload)), payload, padding]
        (folder / f"{shard:05d}.tar").write_bytes(b"".join([*parts, tar.END]))
    assert 25_000 < np.mean([len(p) for p in pictures]) < 35_000
