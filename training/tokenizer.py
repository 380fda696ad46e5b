"""Tokenizers: any Hugging Face one by name or folder, or a byte-level BPE trained on the captions at hand.

MM-GEM's [EMB] and [CAP] are added to whichever tokenizer is used. A trained
tokenizer is a function of the captions alone (its input is sorted), and of all
shards up to 50,000 captions, drawn by hash.
"""

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.hashing import hash64
from training.bottleneck import apart
from training.family_config import TokenizerConfig

EMB, CAP = "[EMB]", "[CAP]"
TRAINED_ON = 50_000


class InTurn:
    """A fast tokenizer's encoding, for one thread at a time."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.encode, self._turn = encode, threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with apart("tokenise"), self._turn:
            return self.encode(*args, **kwargs)

    def __reduce__(self) -> tuple[type["InTurn"], tuple[Callable[..., Any]]]:
        return InTurn, (self.encode,)  # copies have a turn of their own


def take_turns(tokenizer: Any) -> None:
    """Let threads share a Hugging Face fast tokenizer. Padding and truncation are its own state, which each call sets
    before it encodes: a second thread is refused ("Already borrowed"), or encodes by the first one's. What else a
    processor does with pictures and texts needs no turn. Other tokenizers are left as they are."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer._encode_plus = InTurn(tokenizer._encode_plus)  # type: ignore[method-assign]


def train_bpe(captions: list[str], vocab_size: int) -> Any:
    """A `PreTrainedTokenizerFast` of at most `vocab_size` entries over lower-cased captions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    chosen = sorted(captions, key=lambda c: hash64("tokenizer", c))[:TRAINED_ON]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", EMB, CAP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(chosen), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def load_tokenizer(config: TokenizerConfig, captions: Any, *, added: tuple[str, ...] = (EMB, CAP)) -> Any:
    """The recipe's tokenizer with [EMB] and [CAP], or what else is added; `captions()` is called only where one is
    trained.

    Raises:
        UserError: no tokenizer there, one without words, or one without an end token.
    """
    from transformers import AutoTokenizer

    from training.models.kind import opened

    if config.name_or_path is None:
        return train_bpe(list(captions()), config.vocab_size)
    tokenizer = opened(AutoTokenizer, config.name_or_path, "mmgem.tokenizer.name_or_path")
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):  # transformers', of a model's folder without
        raise UserError(
            f"mmgem.tokenizer.name_or_path: {config.name_or_path} holds no tokenizer; name a folder, or a model of the "
            "hub, that does"
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"mmgem.tokenizer.name_or_path: {config.name_or_path} has no end token, at which a caption would stop; "
            "set `eos_token` in its folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that a text must not bring itself: where it ends, is embedded or padded. (Not <unk>.)"""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def caption_ids(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Ids of each text alone, at most `max_tokens`.

    A special token that a text spells out ("</s>", "[EMB]") is left out: tokenizers read it as the token itself, so
    that a caption would end, or be embedded, amid its words.
    """
    special = special_ids(tokenizer)
    found = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_tokens)["input_ids"]
    return [[i for i in row if i not in special] for row in found]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a folder that is there whole or not at all: a kill between its files would leave one that cannot load."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    tokenizer.save_pretrained(str(temporary))
    temporary.rename(folder)
