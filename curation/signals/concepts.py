"""Which entries of a list of concepts a caption names: MetaCLIP's substring matching (Xu et al., arXiv 2309.16671).

The caption is brought into MetaCLIP's normal form and an entry matches where
" entry " is a substring of it: case counts, and an entry with one of the
punctuation marks that the normal form sets apart ("st. louis") matches nothing.
All entries are looked for at once by one Aho-Corasick automaton, with
overlapping matches, because neighbours share a space and "dog" lies in "hot
dog". Entries that the list holds twice both match, as in a search one by one;
MetaCLIP's own automaton knows only the last of them.

By that rule hardly anything of a language without spaces between words
(Chinese, Japanese, Thai, ...) matches. MetaCLIP 2's rule (arXiv 2507.22062) asks
for no space at an end of an entry that is of such a script, or punctuation;
the rest is the same.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from curation.errors import UserError
from curation.hashing import file_hash
from curation.signals.interface import Decoded

NORMAL_FORM = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")})
Rule = Literal["metaclip", "metaclip2"]
# What ends an entry of MetaCLIP 2 without a space: ASCII and CJK punctuation, and the scripts written without spaces.
MARKS = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")
SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x2FF0, 0x2FFF),  # ideographic description
    (0x3400, 0x4DBF),  # CJK ideographs from here on; kana and hangul are in none of these ranges
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2CEB0, 0x2EBEF),
)


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """Column NAME (list<int32>): the places in `metadata` of the entries that match the caption, ascending.

    `metadata`: MetaCLIP's metadata.json or any JSON list of strings.
    `rule`: "metaclip" asks for a space at both ends of every entry, "metaclip2" not at ends without spaces (above).

    Memory: the automaton, in every worker.
    """

    metadata: str
    rule: Rule = "metaclip"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.list_(pa.int32())}

    def content(self) -> dict[str, Any]:
        read_entries(self.metadata)  # a wrong file is known here, before hours of measuring
        return {"metadata": file_hash([Path(self.metadata)]), "rule": self.rule}

    def load(self, name: str) -> "ConceptsMeter":
        return ConceptsMeter(read_entries(self.metadata), name, self.rule)


def read_entries(file: str) -> list[str]:
    """The entries of a metadata file.

    Raises:
        UserError: no such file, or not a JSON list of strings.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"concepts: metadata {file}: no such file; name MetaCLIP's metadata.json or your own JSON list of strings"
        ) from None
    except ValueError as reason:
        raise UserError(f"concepts: metadata {file}: not JSON ({reason}); name a JSON list of strings") from None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"concepts: metadata {file}: not a list of strings; name a JSON list of strings")
    return entries


def normal_form(text: str) -> str:
    """The text as MetaCLIP matches it: spaces around it and around punctuation, other white space as spaces."""
    return f" {text} ".translate(NORMAL_FORM)


def spaced(entry: str, rule: Rule) -> str:
    """What of a caption's normal form the entry matches."""
    if rule == "metaclip" or not entry:
        return f" {entry} "
    return f"{'' if _spaceless(entry[0]) else ' '}{entry}{'' if _spaceless(entry[-1]) else ' '}"


def _spaceless(character: str) -> bool:
    return character in MARKS or any(first <= ord(character) <= last for first, last in SCRIPTS)


class ConceptsMeter:
    def __init__(self, entries: Sequence[str], name: str, rule: Rule = "metaclip") -> None:
        from ahocorasick_rs import AhoCorasick

        self._automaton = AhoCorasick([spaced(entry, rule) for entry in entries])
        self._name = name

    def see(self, sample: Decoded) -> list[int]:
        return self.match(sample.caption)

    def match(self, caption: str) -> list[int]:
        """The places of the entries that match, each once, ascending."""
        found = self._automaton.find_matches_as_indexes(normal_form(caption), overlapping=True)
        return sorted({entry for entry, _, _ in found})

    def columns(self, seen: Sequence[list[int]]) -> dict[str, pa.Array]:
        return {self._name: pa.array(seen, pa.list_(pa.int32()))}
