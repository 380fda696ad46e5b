"""The text detector held against what was painted, and T-MARS's score against open_clip on pictures masked by hand."""

import io
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import text_detector as text_benchmark
from benchmarks.text_detector import FONTS, as_code, fit, font, measure, paint
from curation import tar, text_detector
from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.hashing import hash64
from curation.images import decode
from curation.selection.fraction import Fraction
from curation.signals.text_regions import covered, masked
from curation.synth import synthesise
from tests.conftest import ROOT
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_signals import measure_alone


def sign(text: str, box: tuple[int, int], size: int = 24, name: str = "DejaVuSerif-Bold.ttf") -> bytes:
    """A smooth picture with a line of text at `box`, as PNG."""
    image = Image.open(io.BytesIO(picture(5, (320, 240)))).convert("RGB")
    ImageDraw.Draw(image).text(box, text, fill="white", font=font(name, size), stroke_width=1, stroke_fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("text", "size"), [("big sale today", 14), ("big sale today", 24), ("for sale", 60)])
def test_a_line_is_boxed_where_it_stands(text: str, size: int) -> None:
    image = Image.open(io.BytesIO(sign(text, (12, 90), size))).convert("RGB")
    boxes = text_detector.detect(image)
    truth = np.array(ImageDraw.Draw(image).textbbox((12, 90), text, font=font("DejaVuSerif-Bold.ttf", size)))
    inked, marked = (np.zeros((240, 320), bool) for _ in range(2))
    inked[int(truth[1]) : int(truth[3]), int(truth[0]) : int(truth[2])] = True
    for x0, y0, x1, y1 in boxes.astype(int):
        marked[y0:y1, x0:x1] = True
    assert (marked & inked).sum() / inked.sum() > 0.65
    assert (marked & inked).sum() / marked.sum() > 0.6
    assert boxes.dtype == np.float32 and (boxes[:, 2:] > boxes[:, :2]).all()


def test_nothing_is_found_where_nothing_is_written() -> None:
    for seed in range(20):
        assert len(text_detector.detect(Image.open(io.BytesIO(picture(seed, (300, 220)))))) == 0
    for size in ((1, 1), (3, 400), (40, 40)):
        for mode in ("RGB", "L", "P", "RGBA", "I;16"):
            assert text_detector.detect(Image.new(mode, size)).shape == (0, 4)


@pytest.mark.parametrize("seed", [811, 812])
def test_captions_painted_into_the_embedded_pool_are_found(tmp_path: Path, seed: int) -> None:
    import pyarrow.parquet as pq

    synthesise(out=tmp_path, pairs=400, seed=seed, workers=1, shard_size=400)
    noise = dict(zip(*(pq.read_table(tmp_path / "truth.parquet")[c].to_pylist() for c in ("key", "noise"))))
    data = tar.open_shard(tmp_path / "00000.tar")
    shares: dict[str, list[float]] = {"painted": [], "clean": []}
    for found in tar.samples(data)[0]:
        kind = noise[found.key]
        if kind not in shares or (len(shares["clean"]) >= 60 and kind == "clean"):
            continue
        raw = next(m for e, m in found.members.items() if e in tar.IMAGE_EXTENSIONS)
        image = decode(data[raw.offset : raw.offset + raw.size])[0]
        assert image is not None
        shares[kind].append(covered(text_detector.detect(image), image.size))
    assert len(shares["painted"]) >= 8
    assert np.mean(np.array(shares["painted"]) >= 0.005) >= 0.9
    assert np.mean(np.array(shares["clean"]) >= 0.005) <= 0.1


def test_texts_painted_on_photographs_are_found(photographs: Path) -> None:
    photos = list(text_benchmark.photographs([photographs / "flickr8k/dev/00001.tar"]))[:80]
    figures = measure(photos, seed=2, fonts=FONTS["unseen"])
    assert figures["found"] >= 0.85
    assert figures["false_alarms"] <= 0.2  # of 80; real writing is among them
    assert figures["recall"] >= 0.6 and figures["precision"] >= 0.6


def test_the_fit_finds_the_rule_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(2, 3, (6000, len(text_detector.FEATURES)))
    labels = features[:, 0] + features[:, 3] ** 2 / 4 > 4
    judge = fit(features[:4000], labels[:4000])
    assert ((judge.log_odds(features[4000:]) > 0) == labels[4000:]).mean() > 0.95
    printed: dict[str, Any] = {}
    exec(as_code(judge), printed)
    rows = np.array(list(printed["FEATURES"].values()))
    again = text_detector.Judge(rows, np.array(printed["OFFSET"]), np.array(printed["OUTER"]), printed["BIAS"])
    np.testing.assert_allclose(again.log_odds(features), judge.log_odds(features), atol=0.05)


def test_masking_by_hand() -> None:
    image = Image.open(io.BytesIO(picture(1))).convert("RGB")
    boxes = np.array([[3.4, 5, 20, 11.2], [15, 8, 200, 30], [7, 7, 7, 7]], np.float32)
    pixels = np.asarray(image)
    ours = np.asarray(masked(image, boxes))
    assert (ours[5:8, 3:15] == np.round(pixels[5:12, 3:20].mean((0, 1)))).all()
    assert (ours[8:30, 15:] == np.round(pixels[8:30, 15:].mean((0, 1)))).all(), "the later box lies on top"
    outside = np.ones((80, 96), bool)
    outside[5:12, 3:20] = outside[8:30, 15:] = False
    assert (ours[outside] == pixels[outside]).all()
    assert covered(boxes, image.size) == pytest.approx(1 - outside.mean())


DETECTOR = """
def halves(image):
    width, height = image.size
    return [[0, 0, width / 2, height]] if width > height else []
"""


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A detector of one's own that says that the left half of every wide picture is text."""
    (tmp_path / "my_detector.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_detector", raising=False)
    return "my_detector:halves"


def test_masked_score_is_open_clips_on_the_masked_picture(
    tmp_path: Path, tiny_clip: tuple[Path, Path], detector: str
) -> None:
    import open_clip
    import torch

    shapes = [(96, 80), (60, 90), (120, 64), (70, 70)]
    samples = {str(n): sample(n, jpg=picture(n, shapes[n % 4])) for n in range(70)}
    write_tar(tmp_path / "pool" / "0.tar", samples)
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    regions = {"kind": "text_regions", "detector": detector}
    signals = {"text": regions, "clip_score": {**clip, "mask_text": detector}}
    rows = measure_alone(tmp_path / "pool", tmp_path / "store", signals)
    model, _, transform = open_clip.create_model_and_transforms(tiny_clip[0].stem, pretrained=str(tiny_clip[1]))
    model.eval()
    tokenizer = open_clip.get_tokenizer(tiny_clip[0].stem)
    for row, members in zip(rows, samples.values(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(members["jpg"])).convert("RGB")).copy()
        height, width = pixels.shape[:2]
        boxes = [[0.0, 0.0, width / 2, float(height)]] if width > height else []
        assert row["text_boxes"] == boxes and row["text_area"] == pytest.approx(0.5 if boxes else 0.0)
        if boxes:
            pixels[:, : width // 2] = np.round(pixels[:, : width // 2].reshape(-1, 3).mean(0))
        with torch.no_grad():
            image = model.encode_image(transform(Image.fromarray(pixels))[None], normalize=True)[0]
            text = model.encode_text(tokenizer([members["txt"].decode()]), normalize=True)[0]
        assert row["clip_masked_score"] == pytest.approx(float(image @ text), abs=1e-5)
        assert (row["clip_masked_score"] == row["clip_score"]) == (not boxes)
    plain = measure_alone(tmp_path / "pool", tmp_path / "plain", {"clip_score": clip})
    assert [row["clip_score"] for row in plain] == [row["clip_score"] for row in rows]


def test_a_picture_is_searched_once_for_all_signals(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> None:
    calls: list[tuple[int, int]] = []
    detect = text_detector.detect
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(5)})
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1]), "mask_text": "builtin"}
    with pytest.MonkeyPatch.context() as patch:
        from curation.signals.text_regions import text_finder

        text_finder.cache_clear()
        patch.setattr(text_detector, "detect", lambda image: calls.append(image.size) or detect(image))
        measure_alone(tmp_path / "pool", tmp_path / "store", {"text": {"kind": "text_regions"}, "clip_score": clip})
        text_finder.cache_clear()
    assert len(calls) == 5


def test_wrong_detectors_are_refused_before_measuring() -> None:
    config = parse_config({"signals": {"t": {"kind": "text_regions", "detector": "no_such_module:f"}}})
    with pytest.raises(UserError, match="text detector no_such_module:f: no such module"):
        config.signals["t"].content()


def test_the_recipes_of_text_and_networks(tiny_clip: tuple[Path, Path]) -> None:
    tmars = load_config(ROOT / "recipes/curate/tmars.yaml")
    assert tmars.selectors["tmars"] == Fraction(column="clip_l14_similarity_masked_score", fraction=0.5)
    ours = ["--signals.dfn_score.model", str(tiny_clip[0]), "--signals.dfn_score.pretrained", str(tiny_clip[1])]
    dfn = load_config(ROOT / "recipes/curate/dfn.yaml", ours)
    assert dfn.selectors["dfn"] == Fraction(column="dfn_score", fraction=0.15)


def test_painting_is_a_function_of_its_seed() -> None:
    image = Image.open(io.BytesIO(picture(2, (200, 150)))).convert("RGB")
    one, two = (paint(Random(hash64(1, "k")), image, "a dog on the grass", FONTS["fitted"]) for _ in range(2))
    assert one[0].tobytes() == two[0].tobytes() and (one[1] == two[1]).all()
