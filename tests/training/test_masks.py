"""Masks as functions of a seed: what is hidden, how often, and that nothing else moves it."""

import dataclasses
import random

import numpy as np
import pytest

from curation.errors import UserError
from training.family_config import MaskConfig
from training.masks import block_mask, check_masks, token_mask


def test_blocks_hide_exactly_what_is_asked_in_few_pieces():
    for seed in range(200):
        mask = block_mask(14, 75, 16, 0.3, seed)
        assert mask.shape == (14, 14) and mask.sum() == 75
        assert np.array_equal(mask, block_mask(14, 75, 16, 0.3, seed))
    assert not np.array_equal(mask, block_mask(14, 75, 16, 0.3, 0))
    for patches, min_block in [(1, 1), (15, 15), (16, 16), (9, 4)]:
        assert block_mask(4, patches, min_block, 0.3, 7).sum() == patches


def test_blocks_are_those_of_the_reference():
    """transformers' generator, which stops short of 75 where no block fits: as large, as even and as compact."""
    from transformers.models.flava.image_processing_pil_flava import FlavaMaskingGenerator

    random.seed(0)
    theirs = np.stack([FlavaMaskingGenerator()().numpy() for _ in range(1500)]).astype(bool)
    ours = np.stack([block_mask(14, 75, 16, 0.3, seed) for seed in range(1500)])

    def edges(masks):  # between a hidden and a seen patch, for each hidden patch
        cuts = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
        return (cuts / masks.sum((1, 2))).mean()

    assert theirs.sum((1, 2)).max() <= 75 and ours.mean() == pytest.approx(theirs.mean(), rel=0.05)
    assert edges(ours) == pytest.approx(edges(theirs), rel=0.15)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08


ORDINARY = np.arange(10, 1000)


def masked(seed, whole_words, n=40, share=0.15):
    ids = [2, *range(100, 100 + n), 3]
    words = [None, *(i // 3 for i in range(n)), None]
    return ids, words, *token_mask(ids, words, share, mask_id=4, ordinary=ORDINARY, whole_words=whole_words, seed=seed)


@pytest.mark.parametrize("whole_words", [False, True])
def test_tokens_are_chosen_and_replaced_as_often_as_bert_does(whole_words):
    chosen = hidden = swapped = kept = 0
    for seed in range(2000):
        ids, words, out, labels = masked(seed, whole_words)
        asked = labels >= 0
        assert not asked[0] and not asked[-1]
        assert np.array_equal(out[~asked], np.array(ids)[~asked])
        assert np.array_equal(labels[asked], np.array(ids)[asked])
        if whole_words:
            for word in set(words) - {None}:
                assert len({bool(a) for a, w in zip(asked, words) if w == word}) == 1
        chosen += asked.sum()
        hidden += (out[asked] == 4).sum()
        kept += (out[asked] == labels[asked]).sum()
        swapped += ((out[asked] != 4) & (out[asked] != labels[asked])).sum()
        assert set(out[asked]) <= {4, *ORDINARY}
    assert chosen / 2000 / 40 == pytest.approx(0.15, abs=0.006)
    assert hidden / chosen == pytest.approx(0.8, abs=0.015)
    assert kept / chosen == pytest.approx(0.1, abs=0.015) and swapped / chosen == pytest.approx(0.1, abs=0.015)


def test_the_seed_alone_decides():
    first, again, other = (masked(seed, False)[2:] for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    longer = masked(5, False, n=40, share=0.5)[3]
    assert set(np.flatnonzero(first[1] >= 0)) <= set(
        np.flatnonzero(longer >= 0)
    )  # a larger share keeps what was hidden
    ids, labels = token_mask([2, 3], [None, None], 0.5, mask_id=4, ordinary=ORDINARY, whole_words=True, seed=1)
    assert ids.tolist() == [2, 3] and labels.tolist() == [-100, -100]  # an empty text


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("patches", 0, "masks nothing of 196 patches"),
        ("patches", 196, "masks all of 196"),
        ("min_block", 76, "min_block"),
        ("min_aspect", 0.0, "min_aspect"),
        ("tokens", 0.0, "masks next to nothing"),
        ("tokens", 1.0, "every token"),
        ("tokens", 1e-6, "1e-06 masks next to nothing; give 0.01 to below 1, such as 0.15"),
        ("mismatched", 1.0, "no true pair"),
    ],
)
def test_masks_that_mask_nothing_or_all_are_named(field, value, named):
    check_masks(MaskConfig(), 14)
    check_masks(MaskConfig(tokens=0.01), 14)
    with pytest.raises(UserError, match=named) as error:
        check_masks(dataclasses.replace(MaskConfig(), **{field: value}), 14)
    assert f"flava.masks.{field}" in str(error.value) and "\n" not in str(error.value)
