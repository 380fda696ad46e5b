"""FLAVA's chunks: rows are functions of (seed, epoch, uid), whatever the chunk; holes and mismatched pairs in place."""

import dataclasses

import numpy as np
import pytest
import torch

from curation.hashing import hash64
from training.config import LoaderConfig
from training.data import Drawn, ImageSpec, Loader, Shards
from training.family_config import MaskConfig, TokenizerConfig
from training.models.flava_batch import Extra, load_flava_tokenizer

CAPTIONS = [
    f"a {c} {s} beside {n} unbelievable balloons" for c in ("red", "blue") for s in ("dog", "cat") for n in "34"
]


def codes(pictures, grid):
    """A stand-in of a tokenizer: the first level of each patch."""
    step = pictures.shape[1] // grid
    return torch.from_numpy(pictures[:, ::step, ::step, 0].reshape(len(pictures), -1) % 16).long()


@pytest.fixture(scope="module")
def extra():
    return Extra(
        tokenizer=load_flava_tokenizer(TokenizerConfig(vocab_size=300), lambda: CAPTIONS),
        codebook=codes,
        masks=MaskConfig(patches=6, min_block=3, tokens=0.3, mismatched=0.4),
        size=32,
        grid=4,
        max_tokens=24,
    )


def samples(n, epoch=0):
    rng = np.random.default_rng(0)
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(n + 1)]
    return [
        Drawn(
            hash64(3, epoch, f"u{i}"),
            {"pixels": rng.integers(0, 256, (32, 32, 3), np.uint8), "text": texts[i], "other": texts[i + 1]},
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
def test_rows_do_not_depend_on_their_chunk(extra, kind):
    many = samples(12)
    whole = extra(kind, many)
    for size in (1, 5):
        for start in range(0, 12, size):
            chunk = extra(kind, many[start : start + size])
            for name, tensor in chunk.items():
                expected = whole[name][start : start + size]
                longest = (
                    tensor.shape[1] if name in {"input_ids", "attention_mask", "masked_ids", "text_labels"} else None
                )
                assert torch.equal(tensor, expected[:, :longest] if longest else expected), name
    later = extra(kind, samples(12, epoch=1))
    name = "image_mask" if kind != "texts" else "masked_ids"
    assert not torch.equal(whole[name], later[name])


def test_a_pair_is_masked_where_its_labels_say(extra):
    many = samples(12)
    chunk, tokenizer = extra("pairs", many), extra.tokenizer
    mismatched = torch.tensor([extra.mismatched(s.draw) for s in many])
    assert 0 < mismatched.sum() < 12
    assert torch.equal(chunk["itm_labels"], (~mismatched).long()) and torch.equal(chunk["coupled"], ~mismatched)
    assert (chunk["image_mask"].sum(1) == 6).all()
    for i, sample in enumerate(many):
        ids, text = chunk["input_ids"][i], sample.fields["other" if mismatched[i] else "text"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert ids[0] == tokenizer.cls_token_id and ids[chunk["attention_mask"][i].sum() - 1] == tokenizer.sep_token_id
        asked = chunk["text_labels"][i] >= 0
        assert torch.equal(chunk["text_labels"][i][asked], ids[asked])
        if mismatched[i]:
            assert not asked.any() and (chunk["image_labels"][i] == -100).all()
        else:
            expected = codes(sample.fields["pixels"][None], 4)[0]
            assert torch.equal(chunk["image_labels"][i], torch.where(chunk["image_mask"][i], expected, -100))
            assert torch.equal(chunk["masked_ids"][i][~asked], ids[~asked])


def test_a_pair_that_meets_its_own_words_is_a_match(extra):
    many = [Drawn(s.draw, {**s.fields, "other": s.fields["text"]}) for s in samples(12)]
    assert extra("pairs", many)["itm_labels"].tolist() == [1] * 12
    alone = [Drawn(s.draw, {**s.fields, "other": None}) for s in many]
    assert extra("pairs", alone)["itm_labels"].tolist() == [1] * 12


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mismatched_pair_meets_the_text_of_the_next_sample(shards, world_size):
    """Whatever ranks and chunks there are; only pairs that are to be mismatched read another sample."""
    config, source = LoaderConfig(batch=12, chunk=5, window_shards=1), Shards(shards)
    image = ImageSpec(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = {}

    def gather(kind, rows):
        found.update({row.fields["text"]: row.fields.get("other", "") for row in rows if not row.reason})
        return {}

    for rank in range(world_size):
        place = {"seed": 0, "rank": rank, "world_size": world_size}
        hooks = {"extra": gather, "mismatched": lambda draw: draw % 2 == 0}
        loader = Loader(source, config, image, lambda texts: {}, **place, **hooks)
        list(loader.batches(0, 2))
    texts = {source.key(i): source.sample(i)["txt"].decode() for i in range(len(source))}
    order = [texts[key] for batch in range(3) for key in loader.ids(batch)]
    others = {text: found[text] for text in order[:24] if found[text]}
    assert len(found) == 24 and 0 < len(others) < 24
    assert others == {text: order[order.index(text) + 1] for text in others}


def test_the_share_of_mismatched_pairs_is_the_recipes(extra):
    found = np.mean([extra.mismatched(hash64(3, 2, i)) for i in range(4000)])
    assert found == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
def test_holes_ask_for_nothing(extra, kind):
    many = samples(3)
    many[0] = Drawn(0, {}, "image_broken")
    for given in (many, many[:1]):
        chunk = extra(kind, given)
        assert not chunk.get("coupled", torch.zeros(1))[0]
        for name in ("image_labels", "text_labels", "itm_labels"):
            if name in chunk:
                assert (chunk[name][0] == -100).all()


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_long_texts_are_cut_and_whole_words_fall_together(extra, kind):
    """In the streams that ask for it; the other has single tokens masked."""
    text = "imponderable quizzes " * 30
    words = extra.tokenizer(text, add_special_tokens=False, truncation=True, max_length=22).word_ids()
    assert len(set(words)) < len(words) == 22

    def fates(stream):
        """Of each word: whether its tokens are asked for, the distinct answers."""
        masks = dataclasses.replace(extra.masks, whole_words=(stream,), tokens=0.5, mismatched=0.0)
        row = Drawn(5, {"text": text, "pixels": np.zeros((32, 32, 3), np.uint8)})
        chunk = dataclasses.replace(extra, masks=masks)(kind, [row])
        assert chunk["input_ids"].shape == (1, 24) and chunk["input_ids"][0, -1] == extra.tokenizer.sep_token_id
        asked = (chunk["text_labels"][0, 1:-1] >= 0).tolist()
        assert 0 < sum(asked) < 22
        return [{a for a, w in zip(asked, words) if w == word} for word in set(words)]

    assert all(len(fate) == 1 for fate in fates(kind))
    assert any(len(fate) == 2 for fate in fates({"pairs": "texts", "texts": "pairs"}[kind]))
