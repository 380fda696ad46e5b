"""CLIPScore of ten thousand pairs against open_clip called by hand, two models at once; and every picture is decoded
once, however many signals look at it."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFile

from curation import store
from curation.config import parse_config
from curation.measure import Measuring
from curation.pool import list_shards
from curation.store import Unit
from tests.curation.conftest import sample, write_tar

ROWS, SHARDS = 10_000, 4
TOWER = {"layers": 2, "width": 32}
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "embed_dim": 24,
        "vision_cfg": {**TOWER, "image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {**TOWER, "context_length": 20, "vocab_size": 49408, "heads": 2},
    },
    "quick": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {**TOWER, "image_size": 48, "patch_size": 16, "head_width": 16},
        "text_cfg": {**TOWER, "context_length": 32, "vocab_size": 49408, "heads": 4},
    },
}
SIZES = [(24, 24), (40, 31), (1, 1), (1, 90), (200, 2), (33, 47), (96, 80), (48, 48), (3, 5), (320, 200)]
EDGES = [
    " ",
    "\n",
    "a",
    "a" * 5_000,
    "word " * 200,
    "🐕 runs 🏃‍♀️",
    "一只狗",
    "<end_of_text>",
    "&amp;lt; &quot;",
    "\x00\x07",
    "ﬁne oﬃce",
]
EDGES += [
    "ALL CAPITALS",
    "  many   spaces ",
    "<|endoftext|>",
    "e\u0301 é",
    "\u202eright to left",
    "!!!???",
    "1234567890" * 9,
]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def every_kind(n: int) -> bytes:
    """Picture n, in a format, mode and size of its own turn."""
    rng = np.random.default_rng(n)
    size = SIZES[n // 16 % len(SIZES)]
    image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).resize(size))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn, which nobody here makes
    still = image.convert("P")
    deep = Image.fromarray(rng.integers(0, 2**16, size[::-1], np.uint16))
    return [
        lambda: encoded(image, "JPEG"),
        lambda: encoded(image, "JPEG", quality=95, subsampling=0),
        lambda: encoded(image, "JPEG", progressive=True),
        lambda: encoded(image.convert("L"), "JPEG"),
        lambda: encoded(image.convert("CMYK"), "JPEG"),
        lambda: encoded(image, "JPEG", exif=turned),
        lambda: encoded(image, "PNG"),
        lambda: encoded(alpha, "PNG"),
        lambda: encoded(alpha.convert("LA"), "PNG"),
        lambda: encoded(still, "PNG", transparency=0),
        lambda: encoded(image.convert("1"), "PNG"),
        lambda: encoded(deep, "PNG"),
        lambda: encoded(image, "WEBP"),
        lambda: encoded(alpha, "WEBP"),
        lambda: encoded(still, "GIF", save_all=True, append_images=[still.rotate(90), still.rotate(180)]),
        lambda: encoded(image, "BMP"),
    ][n % 16]()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    import open_clip

    folder = tmp_path_factory.mktemp("models")
    found = {}
    for number, (name, config) in enumerate(MODELS.items()):
        file, weights = folder / f"exact_{name}.json", folder / f"{name}.pt"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        torch.manual_seed(number)
        torch.save(open_clip.create_model(file.stem).state_dict(), weights)
        found[name] = file, weights
    return found


def clip(model: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    return {"kind": "clip", "model": str(model[0]), "pretrained": str(model[1]), **more}


def measured(pool: Path, root: Path, signals: dict[str, Any], unit_samples: int = 1_000) -> pa.Table:
    config = parse_config({"signals": signals, "unit_samples": unit_samples})
    measure = Measuring(signals=config.signals, signal_set=store.open_set(root, config.signals, unit_samples, None))()
    parts = []
    for shard in list_shards([str(pool)]):
        rows = measure(shard)["rows"]
        for number, first in enumerate(range(0, rows, unit_samples)):
            unit = Unit(shard=shard, number=number, rows=min(unit_samples, rows - first))
            measure(unit)
            parts.append(pq.read_table(store.open_set(root, config.signals, unit_samples, None).path(unit)))
    return pa.concat_tables(parts)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[bytes], list[str], list[int]]:
    """(pictures, the caption of each row, the picture of each row); a few pictures are cut short, so that the batches
    in which rows are scored begin anywhere."""
    pictures = [every_kind(n) for n in range(960)]
    for n in range(5, 870, 97):
        pictures[n] = pictures[n][: len(pictures[n]) // 2]
    rng = np.random.default_rng(0)
    words = [
        "a",
        "the",
        "red",
        "dog",
        "house",
        "on",
        "in",
        "water",
        "tree",
        "man",
        "child",
        "sky",
        "old",
        "car",
        "rides",
    ]
    captions = [" ".join(rng.choice(words, n)) + f" {i}" for i, n in enumerate(rng.integers(1, 30, ROWS))]
    captions[:: ROWS // len(EDGES)] = (EDGES * 2)[: len(captions[:: ROWS // len(EDGES)])]
    return pictures, captions, rng.integers(0, 960, ROWS).tolist()


def test_ten_thousand_scores_of_two_models_equal_open_clip_by_hand(
    pairs: tuple[list[bytes], list[str], list[int]], models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    import open_clip

    pictures, captions, of = pairs
    each = ROWS // SHARDS
    for shard in range(SHARDS):
        rows = range(shard * each, (shard + 1) * each)
        members = {f"{i:05d}": {"jpg": pictures[of[i]], "txt": captions[i].encode()} for i in rows}
        write_tar(tmp_path / "pool" / f"{shard}.tar", members)
    signals = {f"{m}_score": clip(models[m]) for m in MODELS}
    whole = measured(tmp_path / "pool", tmp_path / "one", {"small_score": signals["small_score"]})
    both = measured(tmp_path / "pool" / "0.tar", tmp_path / "both", signals)
    assert whole["caption"].to_pylist() == captions and both["small_score"].equals(whole["small_score"].slice(0, each))

    readable, failed = {}, set[int]()
    for n, raw in enumerate(pictures):
        try:
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
                readable[n] = image.copy()
        except OSError:
            continue
    for name, table in (("small", whole), ("quick", both)):
        file, weights = models[name]
        model, _, transform = open_clip.create_model_and_transforms(file.stem, pretrained=str(weights))
        model.eval()
        tokenizer = open_clip.get_tokenizer(file.stem)
        images: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for n, image in readable.items():
                try:
                    images[n] = model.encode_image(transform(image)[None])[0]
                except Exception:  # open_clip itself can make nothing of it
                    failed.add(n)
            step = 111  # no batch of ours
            texts = [model.encode_text(tokenizer(captions[i : i + step])) for i in range(0, table.num_rows, step)]
        text_bd = torch.cat(texts)
        rows = [i for i in range(table.num_rows) if of[i] in images]
        expected = torch.nn.functional.cosine_similarity(torch.stack([images[of[i]] for i in rows]), text_bd[rows])
        scores = table[f"{name}_score"].take(pa.array(rows)).to_numpy()
        assert scores.dtype == np.float32
        assert np.abs(scores - expected.numpy()).max() <= 1e-5, name
        assert expected.std() > 1e-3
        unit = torch.nn.functional.normalize(torch.stack([images[of[i]] for i in rows[:500]]), dim=1)
        embedded = np.array(table[f"{name}_image_embedding"].take(pa.array(rows[:500])).to_pylist())
        np.testing.assert_allclose(embedded, unit.numpy(), atol=1e-3)
    broken = {i for i in range(ROWS) if of[i] not in readable}
    errors = {i: error for i, error in enumerate(whole["error"].to_pylist()) if error}
    assert errors == {
        **dict.fromkeys(broken, "image_decode"),
        **dict.fromkeys((i for i in range(ROWS) if of[i] in failed), "signal_failed"),
    }
    assert 40 < len(broken) < 500 and len(errors) < 1_500
    assert np.corrcoef(*(both[f"{m}_score"].to_numpy()[rows] for m in MODELS))[0, 1] < 0.9  # each its own model's


def test_each_picture_is_decoded_once_however_many_look_at_it(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders are counted: simplejpeg's calls, and the frames that Pillow's plugins load."""
    count = 160  # two batches and a half
    samples = {f"{n:03d}": sample(n, jpg=every_kind(n + 960)) for n in range(count)}
    write_tar(tmp_path / "pool" / "0.tar", samples)
    decoded = Counter[str]()
    by_simplejpeg, by_pillow = simplejpeg.decode_jpeg, ImageFile.ImageFile.load

    def jpeg(*arguments: Any, **options: Any) -> Any:
        decoded["simplejpeg"] += 1
        return by_simplejpeg(*arguments, **options)

    def load(self: ImageFile.ImageFile) -> Any:
        decoded["Pillow"] += bool(self.tile)  # empty once it is decoded
        return by_pillow(self)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", jpeg)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    consumers: dict[str, Any] = {
        "shape": {"kind": "image"},
        "exposure": {"kind": "exposure"},
        "prints": {"kind": "fingerprints"},
        "text_regions": {"kind": "text_regions"},
        "small_score": clip(models["small"], mask_text="builtin"),
        "quick_score": clip(models["quick"]),
    }
    counts = []
    for number in (1, 2, len(consumers)):
        decoded.clear()
        some = dict(list(consumers.items())[:number])
        table = measured(tmp_path / "pool", tmp_path / str(number), some)
        assert table.num_rows == count
        counts.append(dict(decoded))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["simplejpeg"] > 30 and counts[0]["Pillow"] > 80
    assert sum(counts[0].values()) == count, "a picture was decoded twice, or not at all"
