"""FLAVA's chunks: what is masked, swapped and asked for in each sample, as a function of (seed, epoch, uid) alone.

    pairs    both encoders' inputs clean and masked · codes and tokens to predict · match or not
    images   the picture, its mask, codes to predict
    texts    the text clean and masked, tokens to predict

A share of pairs is mismatched, to be told apart: such a pair gets the text of
the sample at the next position of the same source, which the loader puts into
`other`. Positions are shuffled, so that is a text at random, and it is the same
one whatever ranks and chunks the batch is cut into. Mismatched pairs take no
part in the contrastive and masked losses (section 4.1 of the paper); those of
them that meet their own words again are matches. A batch of mismatched pairs
alone has no contrastive loss, where torchmultimodal would train on all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from curation.hashing import hash64, uniform_many
from training.config import MaskConfig, TokenizerConfig
from training.masks import block_mask, token_mask
from training.models.codebook import Codebook

Kind = Literal["pairs", "images", "texts"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the loader knows of one sample. One without the picture or text that its kind needs is a hole.

    pixels: uint8 [S, S, 3] · other: text of the next position, which `mismatched` pairs get instead of their own.
    """

    uid: str
    epoch: int
    pixels: np.ndarray | None = None
    text: str | None = None
    other: str | None = None


def load_flava_tokenizer(config: TokenizerConfig, captions: Callable[[], Iterable[str]]) -> Any:
    """A tokenizer with [CLS], [SEP], [MASK] and padding: BERT's by name, or a BPE trained on `captions()`."""
    from transformers import AutoTokenizer

    from training.tokenizer import train_bpe

    if config.name_or_path is None:
        tokenizer = train_bpe(list(captions()), config.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    wanted = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    missing = {name: token for name, token in wanted.items() if getattr(tokenizer, name) is None}
    tokenizer.add_special_tokens(missing)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Collate:
    """samples of one kind -> tensors of a chunk.

    size, grid: a picture's side in pixels and in patches ·
    codebook: (pictures uint8 [c, S, S, 3], grid) -> codes [c, N].
    """

    tokenizer: Any
    codebook: Codebook
    masks: MaskConfig
    size: int
    grid: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_tokens: int
    seed: int

    def mismatched(self, sample: Sample) -> bool:
        """Whether this pair is to have another's text: the loader reads `other` only then."""
        return bool(uniform_many(hash64(self.seed, "mismatch", sample.epoch), [sample.uid])[0] < self.masks.mismatched)

    def __call__(self, samples: Sequence[Sample], kind: Kind) -> dict[str, torch.Tensor]:
        """The chunk that `Flava.forward` describes; pixels in fp32."""
        pictured, worded = kind != "texts", kind != "images"
        whole = [(s.pixels is not None or not pictured) and (s.text is not None or not worded) for s in samples]
        swapped = [kind == "pairs" and self.mismatched(s) and s.other not in (None, s.text) for s in samples]
        asked = torch.tensor([w and not swap for w, swap in zip(whole, swapped)])
        chunk: dict[str, torch.Tensor] = {}
        if pictured:
            chunk |= self._images(samples, asked)
        if worded:
            texts = [s.other if swap else s.text for s, swap in zip(samples, swapped)]
            chunk |= self._texts(samples, [text or "" for text in texts], asked)
        if kind == "pairs":
            chunk["itm_labels"] = torch.where(torch.tensor(whole), asked.long(), -100)
        return {**chunk, "valid": asked}

    def _images(self, samples: Sequence[Sample], asked: torch.Tensor) -> dict[str, torch.Tensor]:
        blank = np.zeros((self.size, self.size, 3), np.uint8)
        pictures = np.stack([blank if s.pixels is None else s.pixels for s in samples])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        m, seeds = self.masks, [self._draw("patches", s) for s in samples]
        masks = [block_mask(self.grid, m.patches, m.min_block, m.min_aspect, seed).ravel() for seed in seeds]
        hidden = torch.from_numpy(np.stack(masks))  # [c, N]
        codes = torch.where(hidden & asked[:, None], self.codebook(pictures, self.grid), -100)
        return {"pixel_values": (pixels - mean) / std, "image_mask": hidden, "image_labels": codes}

    def _texts(self, samples: Sequence[Sample], texts: Sequence[str], asked: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, words = encode(self.tokenizer, texts, self.max_tokens)
        ordinary = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        drawn = [
            token_mask(
                row,
                word,
                self.masks.tokens,
                mask_id=self.tokenizer.mask_token_id,
                ordinary=ordinary,
                whole_words=self.masks.whole_words,
                seed=self._draw("tokens", sample),
            )
            for row, word, sample in zip(ids, words, samples)
        ]
        labels = padded([row for _, row in drawn], -100)
        return {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "masked_ids": padded([row for row, _ in drawn], self.tokenizer.pad_token_id),
            "text_labels": torch.where(asked[:, None], labels, -100),
        }

    def _draw(self, what: str, sample: Sample) -> int:
        return hash64(self.seed, what, sample.epoch, sample.uid)


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], list[list[int | None]]]:
    """[CLS] text [SEP], at most `max_tokens` each, and the word that each token is of (None: special)."""
    found = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_tokens - 2)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [[cls, *row, sep] for row in found["input_ids"]]
    return ids, [[None, *found.word_ids(i), None] for i in range(len(ids))]


def padded(rows: Sequence[Any], fill: int) -> torch.Tensor:
    """int64 [c, longest]"""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
