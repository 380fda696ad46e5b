"""What FLAVA's chunks hold beside pixels and tokens: what is masked, swapped and asked for, drawn from each row alone.

    pairs    both inputs' masks · codes and tokens to predict · match or not · which rows the contrastive loss takes
    images   the picture's mask · codes to predict
    texts    the text masked · tokens to predict

A share of pairs is mismatched, to be told apart: such a pair gets the text of
the sample at the next position of the same source, which the loader puts into
its fields as "other". Positions are shuffled, so that is a text at random, and
the same one whatever ranks and chunks the batch is cut into. Mismatched pairs
take no part in the contrastive and masked losses (section 4.1 of the paper);
one that meets its own words again is a match. A batch of mismatched pairs alone
has no contrastive loss, where torchmultimodal would train on all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curation.hashing import hash64
from training.data import Drawn
from training.family_config import MaskConfig, TokenizerConfig
from training.masks import block_mask, token_mask
from training.models.codebook import Codebook
from training.tokenizer import special_ids


def load_flava_tokenizer(config: TokenizerConfig, captions: Callable[[], Iterable[str]]) -> Any:
    """A tokenizer with [CLS], [SEP], [MASK] and padding: BERT's by name, or a BPE trained on `captions()`."""
    from transformers import AutoTokenizer

    from training.models.kind import opened
    from training.tokenizer import train_bpe

    if config.name_or_path is None:
        tokenizer = train_bpe(list(captions()), config.vocab_size)
    else:
        tokenizer = opened(AutoTokenizer, config.name_or_path, "flava.tokenizer.name_or_path")
    wanted = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    missing = {name: token for name, token in wanted.items() if getattr(tokenizer, name) is None}
    tokenizer.add_special_tokens(missing)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], list[list[int | None]]]:
    """[CLS] text [SEP], at most `max_tokens` each, and the word that each token is of (None: special). Special tokens
    that a text spells out are left out of it."""
    found = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_tokens - 2)
    cls, sep, special = tokenizer.cls_token_id, tokenizer.sep_token_id, special_ids(tokenizer)
    ids, words = [], []
    for number, row in enumerate(found["input_ids"]):
        own = [(i, word) for i, word in zip(row, found.word_ids(number)) if i not in special]
        ids.append([cls, *(i for i, _ in own), sep])
        words.append([None, *(word for _, word in own), None])
    return ids, words


def padded(rows: Sequence[Any], fill: int) -> torch.Tensor:
    """int64 [c, longest]"""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


@dataclass(slots=True, kw_only=True)
class Extra:
    """(kind, rows) -> the tensors of a chunk that `Flava.forward` asks for, but for pixels and "valid".

    size, grid: a picture's side in pixels and in patches ·
    codebook: (pictures uint8 [c, S, S, 3], grid) -> codes [c, N]; set before the first chunk with pictures.
    """

    tokenizer: Any
    masks: MaskConfig
    size: int
    grid: int
    max_tokens: int
    codebook: Codebook | None = None

    def mismatched(self, draw: int) -> bool:
        """Whether the pair of this draw is to have another's text: the loader reads "other" only then."""
        return hash64(draw, "mismatched") < self.masks.mismatched * 2**64

    def __call__(self, kind: str, rows: Sequence[Drawn]) -> dict[str, torch.Tensor]:
        others = [kind == "pairs" and self.mismatched(row.draw) and row.fields.get("other") for row in rows]
        texts = [other or row.fields.get("text", "") for other, row in zip(others, rows)]
        swapped = torch.tensor([text != row.fields.get("text", "") for text, row in zip(texts, rows)])
        whole = torch.tensor([not row.reason for row in rows])
        asked = whole & ~swapped
        chunk: dict[str, torch.Tensor] = {}
        if kind != "texts":
            chunk |= self._images(rows, asked)
        if kind != "images":
            chunk |= self._texts(kind, rows, texts, asked)
        if kind == "pairs":
            chunk |= {"itm_labels": torch.where(whole, asked.long(), -100), "coupled": asked}
        return chunk

    def _images(self, rows: Sequence[Drawn], asked: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.codebook is not None, "pictures before the codebook"
        blank = np.zeros((self.size, self.size, 3), np.uint8)
        pictures = np.stack([blank if row.reason else row.fields["pixels"] for row in rows])
        m, seeds = self.masks, [hash64(row.draw, "hidden patches") for row in rows]
        masks = [block_mask(self.grid, m.patches, m.min_block, m.min_aspect, seed).ravel() for seed in seeds]
        hidden = torch.from_numpy(np.stack(masks))  # [c, N]
        codes = torch.where(hidden & asked[:, None], self.codebook(pictures, self.grid), -100)
        return {"image_mask": hidden, "image_labels": codes}

    def _texts(
        self, kind: str, rows: Sequence[Drawn], texts: Sequence[str], asked: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        ids, words = encode(self.tokenizer, texts, self.max_tokens)
        ordinary = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        drawn = [
            token_mask(
                tokens,
                word,
                self.masks.tokens,
                mask_id=self.tokenizer.mask_token_id,
                ordinary=ordinary,
                whole_words=kind in self.masks.whole_words,
                seed=hash64(row.draw, "hidden tokens"),
            )
            for tokens, word, row in zip(ids, words, rows)
        ]
        labels = padded([row for _, row in drawn], -100)
        return {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "masked_ids": padded([row for row, _ in drawn], self.tokenizer.pad_token_id),
            "text_labels": torch.where(asked[:, None], labels, -100),
        }
