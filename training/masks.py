"""What masked modelling hides, as pure functions of a seed: blocks of patches, and tokens or whole words.

Masks are drawn in the loader and lie in the chunk as tensors. A seed is made of
(seed, epoch, uid) by `hash64`, so a sample is masked the same way on whichever
rank and in whichever chunk it falls, and another way in the next epoch.

Blocks are BEiT's (arXiv 2106.08254, algorithm 1): rectangles of random area and
aspect, until enough patches are hidden. Where the reference code gives up when
no block fits into what is left, the last block is cut to size here: every
picture hides exactly `patches`, so that every chunk does the same work.
"""

import math
from collections.abc import Sequence

import numpy as np

from curation.errors import UserError
from training.family_config import MaskConfig

FEWEST = 0.01
"""Share of tokens below which most texts, of some dozens, have none to be predicted: nothing makes sure of one."""


def check_masks(masks: MaskConfig, grid: int) -> None:
    """
    Raises:
        UserError: settings that mask next to nothing, everything, or can never be met on a grid of `grid` x `grid`
            patches.
    """
    n = grid * grid
    if not 0 < masks.patches < n:
        what = "nothing" if masks.patches <= 0 else "all"
        raise UserError(f"flava.masks.patches: {masks.patches} masks {what} of {n} patches; give 1 to {n - 1}")
    if not 0 < masks.min_block <= masks.patches:
        raise UserError(
            f"flava.masks.min_block: {masks.min_block} is not within 1 to flava.masks.patches = {masks.patches}"
        )
    if not 0 < masks.min_aspect <= 1:
        raise UserError(f"flava.masks.min_aspect: {masks.min_aspect} is not above 0 and at most 1; the paper takes 0.3")
    if not FEWEST <= masks.tokens < 1:
        what = "every token" if masks.tokens >= 1 else "next to nothing"
        raise UserError(f"flava.masks.tokens: {masks.tokens} masks {what}; give {FEWEST} to below 1, such as 0.15")
    if not 0 <= masks.mismatched < 1:
        raise UserError(
            f"flava.masks.mismatched: {masks.mismatched} leaves no true pair; give a share from 0 to below 1"
        )


def block_mask(grid: int, patches: int, min_block: int, min_aspect: float, seed: int) -> np.ndarray:
    """Hide exactly `patches` of a `grid` x `grid` picture in rectangular blocks: bool [grid, grid].

    min_block: area that blocks are drawn with at least (the last is cut to what is missing) ·
    min_aspect: the aspect is log-uniform in [min_aspect, 1 / min_aspect].
    """
    assert 0 < min_block <= patches <= grid * grid
    rng = np.random.default_rng(seed)
    mask = np.zeros((grid, grid), bool)
    left = patches
    while left:
        area = rng.uniform(min_block, max(min_block, left))
        aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h <= grid and 0 < w <= grid):
            continue
        y, x = rng.integers(grid - h + 1), rng.integers(grid - w + 1)
        block = mask[y : y + h, x : x + w]  # a view
        new = np.argwhere(~block)[:left]  # row by row, so that a cut block stays in one piece
        block[new[:, 0], new[:, 1]] = True
        left -= len(new)
    return mask


def token_mask(
    ids: Sequence[int],
    words: Sequence[int | None],
    share: float,
    *,
    mask_id: int,
    ordinary: np.ndarray,
    whole_words: bool,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(masked ids, labels), int64 [T] each; a label is the token to be predicted, and -100 where none is.

    Each token is chosen with probability `share` (BERT, arXiv 1810.04805, section 3.1), or each word with all its
    tokens where `whole_words`. Of the chosen tokens 80 % become [MASK], 10 % another ordinary token, 10 % stay.

    Args:
        words: word of each token, None for special tokens, which are never chosen.
        ordinary: ids that a token may be replaced by, int64 [V].
    """
    rng = np.random.default_rng(seed)
    out = np.array(ids, np.int64)
    real = np.array([w is not None for w in words], bool)
    unit = np.array([0 if w is None else w for w in words]) if whole_words else np.arange(len(out))
    chosen = (rng.random(int(unit.max(initial=0)) + 1) < share)[unit] & real
    labels = np.where(chosen, out, -100)
    lot, other = rng.random(len(out)), rng.choice(ordinary, len(out))
    out[chosen & (lot < 0.8)] = mask_id
    swapped = chosen & (lot >= 0.8) & (lot < 0.9)
    out[swapped] = other[swapped]
    return out, labels
