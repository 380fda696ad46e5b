"""Measuring, and selecting again, each against the bare way to do the same.

One `Workers` serves all runs of a group, so Ray's start and the workers' imports
are in none of the figures. What a run loads for itself (the model, the
tokenizer) is in ours and not in the peer's. Speeds of measuring are those of the
phase's manifest; selecting again is timed to its end, page and all, since that is
what its user waits for, and over four times the pairs that the peer measures,
as the row says: the page takes a tenth of a second, however many there are.
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

from benchmarks.case import Bench, Case
from curation import phases
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
    few, many = (400, 800) if bench.quick else (8_000, 32_000)
    synthesise(out=pool, pairs=few, seed=0, shard_size=100 if bench.quick else 1_000)
    model, weights = _tiny_clip(bench.work)
    clip = {"kind": "clip", "model": str(model), "pretrained": str(weights)}
    shards = sorted(pool.glob("*.tar"))
    # More threads slow a small model down where the cores have other work too, so the peer takes what serves it best.
    threads = max((1, CORES), key=lambda n: _bare_loop(shards[:1], model.stem, weights, n))
    with Workers(CORES, None) as workers:

        def tolerant(recipe: dict[str, Any], out: Path, pool: Path = pool) -> phases.Run:
            return run_of({"max_error_rate": 1.0, **recipe}, pool, out, out / "signals", workers)

        fresh = count()

        def measure(recipe: dict[str, Any]) -> float:
            out = bench.work / f"measure-{next(fresh)}"
            done = phases.measure(tolerant(recipe, out))
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
        measured, larger = bench.work / "measured", bench.work / "larger"
        synthesise(out=larger, pairs=many, seed=1, shard_size=100 if bench.quick else 1_000)
        phases.measure(tolerant(everything, measured, larger))

        def reselect() -> float:
            threshold = 150 + next(fresh)
            selectors = {
                "language": {"kind": "language", "languages": ["en"]},
                "resolution": {"kind": "threshold", "column": "min_side", "min": threshold},
                "score": {"kind": "fraction", "column": "clip_score", "fraction": 0.5},
                "exact_duplicates": {"kind": "exact_duplicates", "by": ["image_sha256"]},
            }
            began = time.perf_counter()
            done = phases.select(tolerant({**everything, "selectors": selectors}, measured, larger))
            return done["seen"] / (time.perf_counter() - began)

        yield Case(
            name="reselect",
            area="curation",
            unit="pairs/s",
            better="higher",
            reach=100.0,
            peer_name=f"measuring {few:,} pairs again, beside selecting over {many:,} (its page takes as long for any)",
            ours=reselect,
            peer=lambda: measure(everything),
        )


def scoring(bench: Bench) -> Iterator[Case]:
    """CLIPScore where the model is nearly all of the work. Either side loads it: 600 MB take seconds of a minute."""
    import open_clip
    import torch

    model = "ViT-S-32-alt" if bench.quick else "ViT-B-32"
    pool, weights = bench.work / "pool", bench.work / "weights.pt"
    pairs = 8 if bench.quick else 128
    synthesise(out=pool, pairs=pairs, seed=0, shard_size=pairs, noise=False)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), weights)
    recipe = {
        "signals": {"clip_score": {"kind": "clip", "model": model, "pretrained": str(weights)}},
        "unit_samples": pairs // CORES,
    }
    shards = sorted(pool.glob("*.tar"))
    with Workers(CORES, None) as workers:
        fresh = count()

        def measure() -> float:
            out = bench.work / f"measure-{next(fresh)}"
            done = phases.measure(run_of(recipe, pool, out, out / "signals", workers))
            shutil.rmtree(out)
            return done["pairs_per_s"]

        yield Case(
            name="measure_clip_b32",
            area="curation",
            unit="pairs/s",
            better="higher",
            reach=0.95,
            peer_name=f"one process, Pillow decode + open_clip forward of {model} in {CORES} threads, model loaded",
            ours=measure,
            peer=lambda: _bare_loop(shards, model, weights, CORES, loading=True),
        )


def run_of(recipe: dict[str, Any], pool: Path, out: Path, store: Path, workers: Workers) -> phases.Run:
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


def _bare_loop(shards: Sequence[Path], model_name: str, weights: Path, threads: int, loading: bool = False) -> float:
    """What a person writes without a pipeline; `loading` says whether the model's counts. Pairs a second."""
    import open_clip
    import torch
    from PIL import Image

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    began = time.perf_counter()
    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=str(weights))
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    pairs, scores = 0, []
    if not loading:
        began = time.perf_counter()
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
