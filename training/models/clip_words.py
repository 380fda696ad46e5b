"""The tokenizers of open_clip's architectures: its own, or a Hugging Face one that the text config names.

SigLIP's (sentencepiece, cleaned of marks and capitals, padded to its context) is of the second kind. A run keeps its
files in RUN/tokenizer and an export beside the weights, which is where open_clip looks for them.
"""

from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

from curation.errors import UserError, one_line

PAD, SOT, EOT = 0, 49406, 49407
"""Of open_clip's own, whose padding is also its "!"."""


class Words(SimpleTokenizer):
    """open_clip's tokenizer, which also reads captions back."""

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        """[B, T] -> B texts, each up to its <end_of_text>."""
        texts = []
        for row in ids.tolist():
            row = row[: row.index(EOT)] if EOT in row else row
            texts.append(self.decode([i for i in row if not (skip_special_tokens and i in (PAD, SOT))]))
        return texts


def words_of(text_cfg: dict[str, Any], folder: Path | None = None) -> Any:
    """texts -> int64 [B, context_length], as open_clip's `get_tokenizer` gives for this text config.

    Args:
        folder: where the files of a Hugging Face tokenizer are; None: by the name in the config.

    Raises:
        UserError: no such tokenizer, or one that brings code.
    """
    length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    settings.pop("trust_remote_code", None)  # the config is often a downloaded folder's
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return Words(context_length=length, **settings)
    where = str(folder or name)
    try:
        return HFTokenizer(
            where,
            context_length=length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            trust_remote_code=False,
            **settings,
        )
    except (OSError, ValueError) as error:
        line = one_line(error, 200)
        raise UserError(
            f"clip: the tokenizer {where} cannot be read ({line}); name a folder as text_cfg.hf_tokenizer_name"
        ) from None
