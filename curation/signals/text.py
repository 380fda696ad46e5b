"""Caption length as DataComp's filters count it: characters, words split at white space, and fastText's tokens.

The basic filter counts words, the image-based one what `fasttext.tokenize`
gives: runs of bytes between seven ASCII separators, so that Unicode's other
spaces hold words together, and one token more for every line break.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.signals.interface import Decoded

FASTTEXT_TOKEN = re.compile("\n|[^ \n\r\t\v\f\0]+")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Columns `caption_chars`, `caption_words` and `caption_tokens` (int32)."""

    version: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return dict.fromkeys(("caption_chars", "caption_words", "caption_tokens"), pa.int32())

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "Text":
        return self

    def see(self, sample: Decoded) -> tuple[int, int, int]:
        text = sample.caption
        return len(text), len(text.split()), len(FASTTEXT_TOKEN.findall(text))

    def columns(self, seen: Sequence[tuple[int, int, int]]) -> dict[str, pa.Array]:
        counts = zip(*seen, strict=True)
        return {name: pa.array(one, pa.int32()) for name, one in zip(self.schema(""), counts, strict=True)}
