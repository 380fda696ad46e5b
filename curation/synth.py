"""`gemsmith synth`: the embedded pool, written as img2dataset writes a real one, with the truth beside it.

One shard is one unit of work and of resume: a shard's tar is renamed into
place last, so that a shard that is there is complete and is not made again.
Samples follow from (seed, index) alone (`curation.specimens`), hence the bytes
are the same for any number of workers, and a larger pool of the same seed and
shard size begins with the same samples.

OUT/{shard:05d}.tar            key.jpg|png|webp, key.txt, key.json
OUT/{shard:05d}.parquet        img2dataset's table of the shard; OUT/{shard:05d}_stats.json its counts
OUT/truth.parquet              one row a sample, `TRUTH`: what the tars do not tell
OUT/manifest.json              written last

The layouts "classification" (of shapes) and "colours" are CLIP_benchmark's
instead of the first two.
"""

import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from curation import tar
from curation.errors import UserError
from curation.manifest import claim, read_manifest, write_json, write_manifest
from curation.noise import KINDS
from curation.scenes import SHAPES
from curation.specimens import CLASSES, Specimen, World, make, members
from curation.workers import progress

TRUTH = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("noise", pa.string()),
        ("detail", pa.string()),
        ("true_caption", pa.string()),
        ("caption", pa.string()),
        ("objects", pa.list_(pa.struct([(name, pa.string()) for name in ("shape", "colour", "size", "texture")]))),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("phrases", pa.list_(pa.string())),
        ("duplicate_of", pa.string()),
    ]
)
"""`noise` is a kind of `curation.noise.KINDS`; `detail` the language or breakage; `boxes` are (x, y, w, h), pixels."""

_TABLE = pa.schema(
    [(name, pa.string()) for name in ("uid", "caption", "url", "key", "status", "error_message")]
    + [(name, pa.int64()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("exif", "sha256")]
)
LAYOUTS = ("pairs", *CLASSES)
TEMPLATES = {
    "shape": (
        "a {c}", "a picture of a {c}", "an image of a {c}", "a drawing of a {c}", "a photo of a {c} by itself",
        "a striped {c}", "a dotted {c}", "a large {c}", "a small {c}", "the picture shows a {c}",
    ),
    "colour": tuple(f"a {{c}} {shape}" for shape in SHAPES),
}  # fmt: skip
"""Prompts for what the classes are, worded as the captions are."""
_PARTS = ".parts"  # unfinished files, and the truth of each shard until all are there


def _tar_path(out: Path, layout: str, shard: int) -> Path:
    return out / f"{shard:05d}.tar" if layout == "pairs" else out / "test" / f"{shard}.tar"


def _truth_row(specimen: Specimen, shard: str, key: str, caption: str) -> dict[str, Any]:
    return {
        "uid": specimen.uid,
        "shard": shard,
        "key": key,
        "noise": specimen.kind,
        "detail": specimen.detail,
        "true_caption": specimen.true_caption,
        "caption": caption,
        "objects": [
            {"shape": t.shape, "colour": t.colour, "size": t.size, "texture": t.texture} for t in specimen.scene.things
        ],
        "boxes": specimen.boxes,
        "phrases": specimen.phrases,
        "duplicate_of": specimen.duplicate_of,
    }


def _write_shard(world: World, out: Path, layout: str, shard: int, start: int, stop: int) -> int:
    """Make samples start..stop-1 and write their shard; returns how many. Runs in a worker."""
    parts, target = out / _PARTS, _tar_path(out, layout, shard)
    temporary = parts / f"{shard:05d}.{os.getpid()}.tar"
    truth, table = [], []
    with open(temporary, "wb", buffering=1 << 20) as f:
        for index in range(start, stop):
            key = f"{shard:05d}{index - start:04d}"
            specimen = make(world, index)
            files, meta = members(world, specimen, key)
            for extension, content in files.items():
                f.write(tar.header(f"{key}.{extension}", len(content)))
                f.write(content)
                f.write(bytes(tar.padded(len(content)) - len(content)))
            truth.append(_truth_row(specimen, target.stem, key, meta["caption"]))
            table.append(meta)
        f.write(tar.END)
    _write_parquet(pa.Table.from_pylist(truth, TRUTH), parts / f"truth-{shard:05d}.parquet", parts)
    if layout == "pairs":
        _write_parquet(pa.Table.from_pylist(table, _TABLE), out / f"{shard:05d}.parquet", parts)
        count = stop - start
        stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
        write_json(out / f"{shard:05d}_stats.json", {**stats, "status_dict": {"success": count}})
    os.replace(temporary, target)
    return stop - start


def _write_parquet(table: pa.Table, path: Path, parts: Path) -> None:
    temporary = parts / f"{path.name}.{os.getpid()}.tmp"
    pq.write_table(table, temporary)
    os.replace(temporary, path)


def _checked(pairs: int, seed: int, layout: str, workers: int | None, shard_size: int, tail: float) -> None:
    for name, value, low, high in (
        ("pairs", pairs, 1, 10**9),
        ("shard_size", shard_size, 1, 10_000),
        ("workers", 1 if workers is None else workers, 1, 1024),
        ("seed", seed, 0, 2**63),
        ("tail", tail, 0.0, 4.0),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} = {value}: must lie between {low} and {high}")
    if layout not in LAYOUTS:
        raise UserError(f"layout = {layout!r}: must be one of {', '.join(LAYOUTS)}")


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next shard for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(jobs: list[tuple[World, Path, str, int, int, int]], workers: int) -> Iterator[int]:
    """The number of samples of each shard as it is finished, in any order."""
    if workers == 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    # spawn: the caller may hold threads (Ray, torch), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        for future in as_completed([pool.submit(_write_shard, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def synthesise(
    *,
    out: Path,
    pairs: int,
    seed: int,
    noise: bool = True,
    layout: str = "pairs",
    workers: int | None = None,
    shard_size: int = 1000,
    tail: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a pool of `pairs` samples (or a clean set) to the folder `out` and return its manifest.

    Args:
        noise: as web pools are (`curation.noise.KINDS`); False gives a clean set with five captions and regions.
        layout: "pairs" (img2dataset), or CLIP_benchmark's webdataset, always clean and of one thing a picture:
            "classification", whose classes are the shapes, or "colours".
        workers: processes; as many as there are cores where None.
        tail: exponent of the law of concepts, see `sample_concept`; where None, 1 for a pool and 0 for clean sets.

    Raises:
        UserError: a value out of range, or `out` holds something else.
    """
    noise = noise and layout == "pairs"
    tail = float(noise) if tail is None else tail
    _checked(pairs, seed, layout, workers, shard_size, tail)
    law = "pool" if noise else "clean" if layout == "pairs" else layout
    world = World(seed=seed, law=law, tail=tail)
    request = {
        "command": "synth", "pairs": pairs, "seed": seed, "noise": noise, "layout": layout, "shard_size": shard_size,
        "tail": tail,
    }  # fmt: skip
    claim(out, request, overwrite=overwrite)
    parts = out / _PARTS
    finished = read_manifest(out / "manifest.json")
    if finished is not None:
        shutil.rmtree(parts, ignore_errors=True)  # a run may have ended between its manifest and this
        print(f"synth: {out} is complete, nothing to do", file=sys.stderr)
        return finished
    parts.mkdir(exist_ok=True)
    shards = -(-pairs // shard_size)
    jobs = [
        (world, out, layout, shard, shard * shard_size, min((shard + 1) * shard_size, pairs)) for shard in range(shards)
    ]
    _tar_path(out, layout, 0).parent.mkdir(exist_ok=True)
    todo = [job for job in jobs if not _tar_path(out, layout, job[3]).exists()]
    missing = sum(stop - start for *_, start, stop in todo)
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(todo), 1))
    for _ in progress(_run(todo, workers), label="synth", total=missing, unit="pairs", amount=int):
        pass

    truth = pa.concat_tables(pq.read_table(parts / f"truth-{shard:05d}.parquet") for shard in range(shards))
    _write_parquet(truth, out / "truth.parquet", parts)
    if layout in CLASSES:
        kind, classes = CLASSES[layout]
        for path, lines in (
            ("test/nshards.txt", [str(shards)]),
            ("classnames.txt", classes),
            ("zeroshot_classification_templates.txt", TEMPLATES[kind]),
            ("dataset_type.txt", ["single"]),
        ):
            (out / path).write_text("\n".join(lines))
    counts = Counter(truth["noise"].to_pylist())
    manifest = {
        **request, "shards": shards, "kinds": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "versions": {"pillow": PIL.__version__, "pyarrow": pa.__version__},
    }  # fmt: skip
    write_manifest(out / "manifest.json", manifest)
    shutil.rmtree(parts)
    return manifest
