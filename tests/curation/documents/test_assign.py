"""The assignment against all permutations, and the cosines against open_clip called by hand."""

import errno
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from curation.documents.assign import SentenceMeter, assign, match
from curation.documents.config import parse_config
from curation.documents.measure import Measuring, documents_file, items_file
from curation.documents.source import list_documents
from curation.errors import UserError
from curation.signals.clip import Clip, ClipMeter
from tests.curation.conftest import picture, write_tar
from tests.curation.documents.conftest import sentence_document

COSINES = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-1, 1, width=16))
)


def best_sum(similarity: np.ndarray) -> float:
    """The greatest sum of an assignment of distinct sentences to as many pictures as there can be."""
    pictures, sentences = similarity.shape
    if pictures > sentences:
        similarity, pictures, sentences = similarity.T, sentences, pictures
    options = itertools.permutations(range(sentences), pictures)
    return max(sum(similarity[i, j] for i, j in enumerate(chosen)) for chosen in options)


@settings(deadline=None)
@given(COSINES)
def test_no_permutation_is_better(similarity: np.ndarray) -> None:
    sentence = assign(similarity)
    pictures, sentences = similarity.shape
    assert len(sentence) == pictures and (sentence >= 0).all() and (sentence < sentences).all()
    if pictures <= sentences:
        assert len(set(sentence.tolist())) == pictures, "a sentence has at most one picture"
        assert sum(similarity[np.arange(pictures), sentence]) == pytest.approx(best_sum(similarity), abs=1e-5)
    else:
        assert set(sentence.tolist()) == set(range(sentences)), "every sentence has one before any has two"
        of_each = [[i for i in range(pictures) if sentence[i] == j] for j in range(sentences)]
        greatest = max(
            sum(similarity[i, j] for j, i in enumerate(chosen))
            for chosen in itertools.product(*of_each)
            if all(similarity[i, sentence[i]] == similarity[i].max() for i in set(range(pictures)) - set(chosen))
        )  # one of each sentence's pictures was assigned, the others went to their most similar sentence
        assert greatest == pytest.approx(best_sum(similarity), abs=1e-5)


@settings(deadline=None)
@given(COSINES, st.floats(-1, 1, width=16))
def test_only_pictures_that_reach_the_threshold_are_matched(similarity: np.ndarray, least: float) -> None:
    found = match(similarity, least)
    assert ((found.sentence >= 0) == (similarity.max(axis=1) >= least)).all()
    for i in np.flatnonzero(found.sentence >= 0):
        assert found.similarity[i] == similarity[i, found.sentence[i]]


def test_nothing_to_match() -> None:
    assert match(np.zeros((3, 0), np.float32), 0.0).sentence.tolist() == [-1, -1, -1]
    assert match(np.zeros((0, 3), np.float32), 0.0).sentence.tolist() == []


def test_cosines_are_open_clips(tiny_clip: tuple[Path, Path]) -> None:
    import open_clip
    import torch

    images = [Image.open(io.BytesIO(picture(n, (90 + n, 80)))) for n in range(3)]
    sentences = [f"the sentence with number {n}" for n in range(70)]
    meter = SentenceMeter(Clip(model=str(tiny_clip[0]), pretrained=str(tiny_clip[1])))
    for image in images:
        meter.see(meter.pixels(image))
    found = meter.similarities(sentences)
    meter.begin()
    meter.see(meter.pixels(images[0]))
    again = meter.similarities(sentences[:2])

    model, _, transform = open_clip.create_model_and_transforms(tiny_clip[0].stem, pretrained=str(tiny_clip[1]))
    tokens = open_clip.get_tokenizer(tiny_clip[0].stem)(sentences)
    with torch.no_grad():
        image_nd = model.eval().encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        expected = (image_nd @ model.encode_text(tokens, normalize=True).T).numpy()
    assert found.shape == (3, 70)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(again, expected[:1, :2], atol=1e-5)


def test_cosines_that_are_no_numbers_are_an_error_of_their_document(
    sentence_pool: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch

    state = torch.load(tiny_clip[1], weights_only=True)
    torch.save({**state, "visual.proj": torch.full_like(state["visual.proj"], torch.nan)}, tmp_path / "diverged.pt")
    clip = {"model": str(tiny_clip[0]), "pretrained": str(tmp_path / "diverged.pt")}
    config = parse_config({"assign": {"clip": clip}})
    shard = list_documents([str(sentence_pool)], config.unit_documents)[0]
    found = Measuring(config=config, store=tmp_path / "store")()(shard)
    assert (found["documents"], found["errors"]) == (6, {"not_finite": 6})
    assert found["causes"] == [f"{shard.path} 0000: not_finite: assign.clip: a cosine is NaN or infinite"]


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that fails on a whole batch of pictures, and on a text that asks for it."""
    images, texts = ClipMeter.images, ClipMeter.texts

    def of_images(self: ClipMeter, pixels: Sequence[Any]) -> Any:
        if len(pixels) == 64:
            raise RuntimeError("a tensor\n is odd")
        return images(self, pixels)

    def of_texts(self: ClipMeter, captions: Sequence[str]) -> Any:
        if any("shatter" in caption for caption in captions):
            raise FAULTS[next(word for word in FAULTS if any(word in caption for caption in captions))]
        return texts(self, captions)

    monkeypatch.setattr(ClipMeter, "images", of_images)
    monkeypatch.setattr(ClipMeter, "texts", of_texts)


FAULTS = {
    "shatter in memory": MemoryError(),
    "shatter on disk": OSError(errno.EIO, "input/output error"),
    "shatter on the card": type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
    "shatter": ValueError("no such token"),
}


def documents_of(folder: Path, documents: dict[str, dict[str, bytes]], tiny_clip: tuple[Path, Path]) -> dict[str, Any]:
    """What measuring them in one tar gives, with the parquet files of documents and items."""
    config = parse_config({"assign": {"clip": {"model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}}})
    write_tar(folder / "pool" / "0.tar", documents)
    (shard,) = list_documents([str(folder / "pool")], config.unit_documents)
    found = Measuring(config=config, store=folder / "store")()(shard)
    path = documents_file(folder / "store", shard)
    return {**found, "rows": pq.read_table(path).to_pylist(), "items": pq.read_table(items_file(path)).to_pylist()}


def said(n: int, text: str) -> dict[str, bytes]:
    members = sentence_document(n)
    meta = json.loads(members["json"])
    return {**members, "json": json.dumps({**meta, "text_list": [*meta["text_list"], text]}).encode()}


def test_a_failing_encoder_costs_its_document(tmp_path: Path, tiny_clip: tuple[Path, Path], breaking: None) -> None:
    sound = {f"{n}": sentence_document(n) for n in range(4)}
    broken = {"1b": sentence_document(5, pictures=66), "2b": said(6, "Here is a shatter.")}
    alone = documents_of(tmp_path / "alone", sound, tiny_clip)
    found = documents_of(tmp_path / "all", dict(sorted({**sound, **broken}.items())), tiny_clip)
    assert (alone["documents"], alone["errors"], alone["causes"]) == (4, {}, [])
    assert (found["documents"], found["errors"]) == (6, {"signal_failed": 2})
    pool = tmp_path / "all" / "pool" / "0.tar"
    assert found["causes"] == [f"{pool} 1b: signal_failed: assign.clip: RuntimeError: a tensor is odd"]
    assert [(row["key"], row["items"]) for row in found["rows"] if row["error"]] == [("1b", 0), ("2b", 0)]

    def kept(of: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**row, "path": None, "offset": None, "fingerprint": None} for row in of["items"]]

    assert kept(found) == kept(alone) and sum(row["similarity"] is not None for row in found["items"]) == 8


def test_a_strip_that_the_model_would_enlarge_to_gigabytes_is_dropped(
    tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    strip = io.BytesIO()
    Image.new("RGB", (100_000, 1)).save(strip, "PNG")
    document = {**sentence_document(0, pictures=2), "p1.jpg": strip.getvalue()}
    found = documents_of(tmp_path, {"0": document}, tiny_clip)
    assert found["errors"] == {}
    assert [row["error"] for row in found["items"] if row["text"] is None] == [None, "decompression_bomb"]


@pytest.mark.parametrize("word", [word for word in FAULTS if word != "shatter"])
def test_what_is_no_documents_fault_is_raised(
    word: str, tmp_path: Path, tiny_clip: tuple[Path, Path], breaking: None
) -> None:
    """Or a full card would make a pool of errors, under any budget."""
    with pytest.raises((MemoryError, OSError, UserError)) as raised:
        documents_of(tmp_path, {"0": said(0, f"A {word}.")}, tiny_clip)
    if word == "shatter on the card":
        assert "assign.clip: the GPU has failed (CUDA out of memory); run again with fewer" in str(raised.value)
    else:
        assert raised.value is FAULTS[word]
