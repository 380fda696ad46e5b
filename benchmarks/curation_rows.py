"""Curation by phase: measure, select again, build; each against the bare way to do the same.

One `Workers` serves all runs of a group, so Ray's start and the workers' imports
are in none of the figures. What a run loads for itself (the model, the
tokenizer) is in ours and not in the peer's. Speeds are those of the phases'
manifests: selection is timed to its ledger, without the page that follows.
"""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Bench, Case
from curation import phases, tar
from curation.config import parse_config
from curation.pool import list_shards
from curation.synth import synthesise
from curation.workers import Workers

CORES = len(os.sched_getaffinity(0))
CLIP_BATCH = 64
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""So small that decoding the pictures is most of the work."""


def measuring(bench: Bench) -> Iterator[Case]:
    pool = bench.work / "pool"
    synthesise(out=pool, pairs=400 if bench.quick else 8_000, seed=0, shard_size=100 if bench.quick else 1_000)
    model, weights = _tiny_clip(bench.work)
    clip = {"kind": "clip", "model": str(model), "pretrained": str(weights)}
    shards = sorted(pool.glob("*.tar"))
    # More threads slow a small model down where the cores have other work too, so the peer takes what serves it best.
    threads = max((1, CORES), key=lambda n: _bare_loop(shards[:1], model.stem, weights, n))
    with Workers(CORES, None) as workers:

        def run_of(recipe: dict[str, Any], out: Path, store: Path) -> phases.Run:
            return _run({"max_error_rate": 1.0, **recipe}, pool, out, store, workers)

        fresh = count()

        def measure(recipe: dict[str, Any]) -> float:
            out = bench.work / f"measure-{next(fresh)}"
            done = phases.measure(run_of(recipe, out, out / "signals"))
            shutil.rmtree(out)
            return done["pairs_per_s"]

        yield Case(
            name="measure_tiny_clip",
            area="curation",
            unit="pairs/s",
            better="higher",
            reach=1.5,
            peer_name=f"one process, Pillow decode + open_clip forward, best of 1 and {CORES} threads: {threads}",
            ours=lambda: measure({"signals": {"clip_score": clip}}),
            peer=lambda: _bare_loop(shards, model.stem, weights, threads),
        )

        signals = {name: {"kind": name} for name in ("text", "language", "image", "fingerprints")}
        everything = {"signals": {**signals, "clip_score": clip}}
        measured = bench.work / "measured"
        phases.measure(run_of(everything, measured, measured / "signals"))

        def reselect() -> float:
            threshold = 150 + next(fresh)
            selectors = {
                "language": {"kind": "language", "languages": ["en"]},
                "resolution": {"kind": "threshold", "column": "min_side", "min": threshold},
                "score": {"kind": "fraction", "column": "clip_score", "fraction": 0.5},
                "exact_duplicates": {"kind": "exact_duplicates", "by": ["image_sha256"]},
            }
            return phases.select(run_of({**everything, "selectors": selectors}, measured, measured / "signals"))[
                "pairs_per_s"
            ]

        yield Case(
            name="reselect",
            area="curation",
            unit="pairs/s",
            better="higher",
            reach=100.0,
            peer_name="measuring again",
            ours=reselect,
            peer=lambda: measure(everything),
        )


def _run(recipe: dict[str, Any], pool: Path, out: Path, store: Path, workers: Workers) -> phases.Run:
    """One invocation of a phase, as `curate` makes it, with workers that outlive it."""
    return phases.Run(
        config=parse_config(recipe),
        pool=list_shards([str(pool)]),
        out=out,
        root=store,
        slice=None,
        workers=workers,
        identity=recipe,
        read={},
    )


def _tiny_clip(folder: Path) -> tuple[Path, Path]:
    """(model config, checkpoint) with random weights: the time is that of any weights."""
    import open_clip
    import torch

    config, weights = folder / "gemsmith_bench_clip.json", folder / "weights.pt"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(config.stem).state_dict(), weights)
    return config, weights


def _bare_loop(shards: Sequence[Path], model_name: str, weights: Path, threads: int) -> float:
    """What a person writes without a pipeline; the model's loading is not counted. Pairs a second."""
    import open_clip
    import torch
    from PIL import Image

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=str(weights))
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    began, pairs, scores = time.perf_counter(), 0, []
    pixels: list[Any] = []
    captions: list[str] = []

    def flush() -> None:
        with torch.inference_mode():
            image = model.encode_image(torch.stack(pixels), normalize=True)
            text = model.encode_text(tokenizer(captions), normalize=True)
            scores.append((image * text).sum(1).numpy())
        pixels.clear()
        captions.clear()

    for shard in shards:
        waiting: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as f:
            for member in f:
                key, _, extension = member.name.partition(".")
                content = f.extractfile(member)
                assert content is not None
                waiting.setdefault(key, {})[extension] = content.read()
        for sample in waiting.values():
            pairs += 1
            image = next((sample[e] for e in ("jpg", "png", "webp") if e in sample), None)
            try:
                picture = transform(Image.open(io.BytesIO(image or b"")))
                caption = sample["txt"].decode()
            except (OSError, KeyError, UnicodeDecodeError):
                continue
            pixels.append(picture)
            captions.append(caption)
            if len(pixels) == CLIP_BATCH:
                flush()
    if pixels:
        flush()
    speed = pairs / (time.perf_counter() - began)
    torch.set_num_threads(before)
    return speed


def building(bench: Bench) -> Iterator[Case]:
    """30 KB members, everything in the page cache, nothing synced."""
    pool = bench.work / "pool"
    _noise_pool(pool, shards=4 if bench.quick else 16, samples=50 if bench.quick else 500)
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
        with webdataset.ShardWriter(pattern, maxcount=2_000, encoder=False, verbose=0) as sink:
            for sample in webdataset.WebDataset(urls, shardshuffle=False):
                sink.write(sample)
        spent = time.perf_counter() - began
        for path in copies.iterdir():
            path.unlink()
        return spent

    with Workers(CORES, None) as workers:

        def selected(name: str, selectors: dict[str, Any]) -> phases.Run:
            recipe = {
                "signals": {"text": {"kind": "text"}}, "selectors": selectors, "unit_samples": 500,
                "shard_samples": 2_000,
            }  # fmt: skip
            run = _run(recipe, pool, bench.work / name, bench.work / "signals", workers)
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


def _noise_pool(folder: Path, *, shards: int, samples: int) -> None:
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
