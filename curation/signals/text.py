"""Caption length, as DataComp's basic filter counts it: characters, and words split at white space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Text:
    """Columns `caption_chars` and `caption_words` (int32)."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"caption_chars": pa.int32(), "caption_words": pa.int32()}

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "Text":
        return self

    def see(self, sample: Decoded) -> tuple[int, int]:
        return len(sample.caption), len(sample.caption.split())

    def columns(self, seen: Sequence[tuple[int, int]]) -> dict[str, pa.Array]:
        chars, words = zip(*seen, strict=True)
        return {"caption_chars": pa.array(chars, pa.int32()), "caption_words": pa.array(words, pa.int32())}
