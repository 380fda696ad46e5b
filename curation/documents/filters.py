"""The rules for pictures, for texts and for whole documents; each says why something goes.

Defaults are off; the numbers stand in the recipes, with their sources. A rule is
given facts alone (sizes, words), never pixels: those were looked at once, when the
pool was measured.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from curation.documents import words as counting
from curation.errors import UserError

SIZE = re.compile(r"\s*(\d{1,6})(?:\.\d*)?\s*(px|%)?;?\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What a picture must be. Sides in pixels; `rendered_min_side` is for the width and height that the page sets;
    `url_words` are parts of an address, compared in lower case, that mark it as no content."""

    formats: list[str] = field(default_factory=list)
    min_side: int = 0
    max_side: int = 1_000_000
    rendered_min_side: int = 0
    max_aspect: float | None = None
    url_words: list[str] = field(default_factory=list)

    def reason(
        self, *, src: str, image_format: str, width: int, height: int, rendered: tuple[str, str] = ("", "")
    ) -> str | None:
        """The first rule that a decoded picture breaks, or None."""
        address = "" if src.startswith("data:") else src.lower()
        if any(word in address for word in self.url_words):
            return "image_url"
        if self.formats and image_format not in self.formats:
            return "image_format"
        if min(width, height) < self.min_side:
            return "image_small"
        if max(width, height) > self.max_side:
            return "image_large"
        sides = [_rendered(text, side) for text, side in zip(rendered, (width, height), strict=True)]
        if any(side is not None and not self.rendered_min_side <= side <= self.max_side for side in sides):
            return "image_rendered_size"
        if self.max_aspect is not None and max(width, height) / min(width, height) > self.max_aspect:
            return "image_aspect"
        return None


def _rendered(text: str, side: int) -> int | None:
    """The pixels that a width or height attribute asks for; None where it is no number."""
    found = SIZE.fullmatch(text)
    if found is None:
        return None
    return round(side * int(found[1]) / 100) if found[2] == "%" else int(found[1])


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What a text must be: word counts, and shares in 0..1 as `curation.documents.words` computes them.

    Punctuation is judged from `punctuation_from` words and marks on. The list of flagged or of common words is a
    file that the recipe names; without it their rules must be off.
    """

    min_words: int = 0
    max_words: int = 1_000_000_000
    repetition_characters: int = 10
    max_character_repetition: float = 1.0
    repetition_words: int = 5
    max_word_repetition: float = 1.0
    max_special_characters: float = 1.0
    min_stopwords: float = 0.0
    max_flagged_words: float = 1.0
    punctuation_from: int = 0
    min_punctuation: float = 0.0
    min_common_words: float = 0.0

    def reason(self, text: str, lists: "Lists") -> str | None:
        """The first rule that a text breaks, in OBELICS' order, or None. Only what a rule needs is counted."""
        words = counting.words_of(text)
        if not self.min_words <= len(words) <= self.max_words:
            return "words"
        if (
            self.max_character_repetition < 1
            and counting.character_repetition(text, self.repetition_characters) > self.max_character_repetition
        ):
            return "character_repetition"
        if (
            self.max_word_repetition < 1
            and counting.word_repetition(words, self.repetition_words) > self.max_word_repetition
        ):
            return "word_repetition"
        if counting.special_characters(text) > self.max_special_characters:
            return "special_characters"
        if counting.share_in(words, lists.stopwords) < self.min_stopwords:
            return "stopwords"
        if counting.share_in(words, lists.flagged_words) > self.max_flagged_words:
            return "flagged_words"
        if self.min_punctuation > 0 and counting.punctuation(text, self.punctuation_from) < self.min_punctuation:
            return "punctuation"
        if self.min_common_words > 0 and counting.share_in(words, lists.common_words) < self.min_common_words:
            return "common_words"
        return None


@dataclass(frozen=True, kw_only=True)
class ListFiles:
    """Files of words, one a line, in place of the lists of `curation.documents.words`; of flagged and of common words
    there is none of ours."""

    stopwords: str | None = None
    boilerplate: str | None = None
    flagged_words: str | None = None
    common_words: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The lists of words that rules compare with, in lower case."""

    stopwords: Collection[str]
    boilerplate: Collection[str]
    flagged_words: Collection[str]
    common_words: Collection[str]


def load_lists(files: ListFiles) -> Lists:
    """Read the files.

    Raises:
        UserError: one cannot be read.
    """
    return Lists(
        stopwords=_words("stopwords", files.stopwords, counting.STOPWORDS),
        boilerplate=_words("boilerplate", files.boilerplate, counting.BOILERPLATE_WORDS),
        flagged_words=_words("flagged_words", files.flagged_words, frozenset()),
        common_words=_words("common_words", files.common_words, frozenset()),
    )


def _words(name: str, path: str | None, ours: frozenset[str]) -> frozenset[str]:
    if path is None:
        return ours
    try:
        return frozenset(
            line.strip().lower() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError):
        raise UserError(f"lists.{name} {path}: cannot be read as text; name a file of words, one a line") from None
