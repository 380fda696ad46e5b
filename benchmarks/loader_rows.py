"""The loader against open_clip's webdataset pipeline, and against reading the same tars with nothing done to them.

Both make batches of 64 pairs from the same shards: a random box of 90 to 100 %
of the picture, bicubic to the model's size, normalised, beside the caption as
tokens of the same tokenizer. One worker each: a thread of ours, a process of
theirs; the process that asks for the batches does nothing else. The first
batch, with which workers start, is not timed. Every picture is read from its
tar and decoded, by either side.

The embedded pool's pictures are small, so the rows run on them twice: as they
are into a model of 64 pixels, and drawn at 480 x 360, as the web has them, into
one of 224. A folder of other shards is measured by

    python -m benchmarks.loader_rows SHARDS SIZE
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.case import Bench, Case, Measure
from curation import tar
from curation.synth import synthesise

BATCH = 64
WORK = "open_clip's webdataset pipeline, one worker: the same shards, transform and tokenizer"


def loading(bench: Bench) -> Iterator[Case]:
    pool = bench.work / "pool"
    pairs = 256 if bench.quick else 2_048
    synthesise(out=pool, pairs=pairs, seed=0, noise=False)
    web = _as_web(pool, bench.work / "web", 256 if bench.quick else 1_024)
    shared: dict[str, Any] = {"area": "training", "unit": "samples/s", "better": "higher"}
    for name, folder, size in (("loader_small", pool, 64), ("loader_web", web, 224)):
        ours, peer = sides(folder, size)
        yield Case(name=name, reach=1.5, peer_name=f"{WORK}, {size} pixels", ours=ours, peer=peer, **shared)
    yield Case(
        name="loader_raw",
        reach=0.01,
        peer_name="the same tars read member by member by tarfile, with nothing decoded",
        ours=sides(web, 224)[0],
        peer=_raw(web),
        **shared,
    )


def sides(shards: Path, size: int) -> tuple[Measure, Measure]:
    """Samples per second of our loader and of open_clip's, over one pass of the shards."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return _ours(shards, size, tokenizer), _theirs(shards, size, tokenizer)


def _ours(shards: Path, size: int, tokenizer: Any) -> Measure:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from training.config import LoaderConfig
    from training.data import ImageSpec, Loader, Shards

    config = LoaderConfig(batch=BATCH, chunk=BATCH, crop_scale=(0.9, 1.0), threads=1)
    spec = ImageSpec(size=size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD, resize_mode="shortest")

    def once() -> float:
        found = Shards(shards)
        encode = lambda texts: {"input_ids": tokenizer(texts)}  # noqa: E731
        loader = Loader(found, config, spec, encode, seed=0, rank=0, world_size=1)
        rate = _rate(chunk["pixel_values"] for (chunk,) in loader.batches(0, len(found) // BATCH))
        assert not loader.holes
        return rate

    return once


def _theirs(shards: Path, size: int, tokenizer: Any) -> Measure:
    from open_clip.transform import AugmentationCfg, image_transform
    from open_clip_train import data as peer

    paths = "::".join(str(path) for path in sorted(shards.glob("*.tar")))
    transform = image_transform(size, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))

    def once() -> float:
        arguments = SimpleNamespace(
            train_data=paths,
            train_num_samples=_samples(shards),
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            workers=1,
            world_size=1,
            batch_size=BATCH,
        )
        data = peer.get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer)
        return _rate(pictures for pictures, _ in data.dataloader)

    return once


def _rate(batches: Iterator[Any]) -> float:
    """Samples per second of all batches but the first."""
    next(batches)
    began, seen = time.perf_counter(), 0
    for pictures in batches:
        seen += len(pictures)
    return seen / (time.perf_counter() - began)


def _raw(shards: Path) -> Measure:
    import tarfile

    def once() -> float:
        began, keys = time.perf_counter(), set()
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    assert content is not None
                    content.read()
                    keys.add((path, tar.split_name(member.name)[0]))
        return len(keys) / (time.perf_counter() - began)

    return once


def _samples(shards: Path) -> int:
    return sum(len(tar.samples(tar.open_shard(path))[0]) for path in shards.glob("*.tar"))


def _as_web(pool: Path, folder: Path, pairs: int) -> Path:
    """Shards of 256 of the pool's pairs, their pictures at 480 x 360."""
    from PIL import Image

    found = []
    for path in sorted(pool.glob("*.tar")):
        data = tar.open_shard(path)
        found += [(data, sample.members) for sample in tar.samples(data)[0] if {"jpg", "txt"} <= sample.members.keys()]
    folder.mkdir()
    for start in range(0, pairs, 256):
        parts = []
        for number, (data, members) in enumerate(found[start : min(start + 256, pairs)], start):
            raw, text = (data[m.offset : m.offset + m.size] for m in (members["jpg"], members["txt"]))
            picture = io.BytesIO()
            image = Image.open(io.BytesIO(raw)).convert("RGB").resize((480, 360), Image.Resampling.BICUBIC)
            image.save(picture, "JPEG", quality=90)
            record = json.dumps({"uid": f"{number:032x}"}).encode()
            for extension, payload in (("jpg", picture.getvalue()), ("txt", text), ("json", record)):
                parts += [tar.header(f"{number:06d}.{extension}", len(payload)), payload]
                parts += [bytes(tar.padded(len(payload)) - len(payload))]
        (folder / f"{start // 256:08d}.tar").write_bytes(b"".join([*parts, tar.END]))
    return folder


if __name__ == "__main__":
    ours, theirs = sides(Path(sys.argv[1]), int(sys.argv[2]))
    rates = [(ours(), theirs()) for _ in range(3)]
    for mine, peer in rates:
        print(f"ours {mine:.0f}, open_clip {peer:.0f} samples/s: {mine / peer:.2f}x")
    print(f"median {statistics.median(mine / peer for mine, peer in rates):.2f}x")
