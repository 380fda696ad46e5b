"""The assignment against all permutations, and the cosines against open_clip called by hand."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from curation.documents.assign import SentenceMeter, assign, match
from curation.documents.config import parse_config
from curation.documents.measure import Measuring
from curation.documents.source import list_documents
from curation.signals.clip import Clip
from tests.curation.conftest import picture

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
        meter.see(image)
    found = meter.similarities(sentences)
    meter.see(images[0])
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
    assert Measuring(config=config, store=tmp_path / "store")()(shard) == {"documents": 6, "errors": {"not_finite": 6}}
