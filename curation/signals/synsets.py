"""How many words of a caption name a class of ImageNet-21k: DataComp's text-based filter (arXiv 2304.14108).

DataComp asks nltk for each word between white space, takes the first synset and
looks for its offset among the ids; an offset counts whatever its part of
speech, as there. WordNet 3.0 is a download, so it comes by path, and its plain
files are read here: the words (index.*), the irregular forms (*.exc), and
Morphy's endings, as nltk 3.8 applies them (DataComp's version).

Without WordNet a word of two letters or more counts when it, or its singular by
the endings of nouns, is the name of a class in timm's list. That cannot know
which sense of a word comes first, so it finds more ("front", "red" and "man"
name classes of their own), and lets more captions through.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curation.errors import UserError
from curation.hashing import file_hash
from curation.signals.interface import Decoded

SPEECH = {  # nltk's order of the parts of speech, and what Morphy makes of a word's end
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}
ENDINGS = {pos: [tuple(rule.split(":")) for rule in rules.split()] for pos, rules in SPEECH.items()}
IDS, LEMMAS = "imagenet21k_goog_synsets.txt", "imagenet_synset_to_lemma.txt"


@dataclass(frozen=True, kw_only=True)
class Synsets:
    """Column NAME (int32): words of the caption that name one of `synsets`.

    `wordnet`: folder of WordNet 3.0's database as nltk's corpora/wordnet has it (index.noun, noun.exc, ...); without
    it, names of classes are compared.
    `synsets`: file with an id such as n02084071 a line; timm's list of ImageNet-21k unless given. Needs `wordnet`.
    """

    wordnet: str | None = None
    synsets: str | None = None
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def __post_init__(self) -> None:
        if self.synsets is not None and self.wordnet is None:
            raise UserError(f"synsets: {self.synsets} needs WordNet to find synsets; set wordnet, or leave it out")
        for file in self._files():
            if not file.is_file():
                raise UserError(
                    f"synsets: {file}: no such file; "
                    + ("name a file of ids" if file == self._ids() else "name nltk's corpora/wordnet folder")
                )

    def _ids(self) -> Path:
        return Path(self.synsets) if self.synsets is not None else timm_list(IDS)

    def _files(self) -> list[Path]:
        if self.wordnet is None:
            return [timm_list(LEMMAS)]
        folder = Path(self.wordnet)
        return [self._ids(), *(folder / name for pos in SPEECH for name in (f"index.{pos}", f"{pos}.exc"))]

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.int32()}

    def content(self) -> dict[str, Any]:
        return {"source": "names" if self.wordnet is None else "wordnet", "files": file_hash(self._files())}

    def made_by(self) -> str:
        if self.wordnet is None:
            return "names of ImageNet-21k's classes, in place of WordNet"
        return f"WordNet in {Path(self.wordnet).name}"

    def load(self, name: str) -> "SynsetsMeter":
        if self.wordnet is None:
            names = read_names(timm_list(LEMMAS))
            return SynsetsMeter(name, lambda word: not names.isdisjoint([word, *_shortened([word], "noun")]))
        ids, wordnet = read_ids(self._ids()), WordNet.read(Path(self.wordnet))
        return SynsetsMeter(name, lambda word: wordnet.first_offset(word) in ids)


class SynsetsMeter:
    def __init__(self, name: str, names_one: Callable[[str], bool]) -> None:
        self._name = name
        self._names_one = lru_cache(maxsize=1 << 18)(names_one)

    def see(self, sample: Decoded) -> int:
        return sum(self._names_one(word.lower()) for word in sample.caption.split())

    def columns(self, seen: Sequence[int]) -> dict[str, pa.Array]:
        return {self._name: pa.array(seen, pa.int32())}


@dataclass(frozen=True, kw_only=True)
class WordNet:
    """By part of speech, the first synset's offset of each word, and the words behind an irregular form."""

    first: Mapping[str, Mapping[str, int]]
    exceptions: Mapping[str, Mapping[str, list[str]]] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> "WordNet":
        return cls(
            first={pos: _read_index(folder / f"index.{pos}") for pos in SPEECH},
            exceptions={pos: _read_exceptions(folder / f"{pos}.exc") for pos in SPEECH},
        )

    def first_offset(self, word: str) -> int | None:
        """`wordnet.synsets(word)[0].offset()` in nltk, for a word in lower case; None where there is no synset."""
        for pos, first in self.first.items():
            for form in self._forms(word, pos):
                if form in first:
                    return first[form]
        return None

    def _forms(self, word: str, pos: str) -> Iterator[str]:
        """What Morphy looks up, in order: irregular forms alone where there are any, else ending by ending."""
        yield word
        if word in self.exceptions[pos]:
            yield from self.exceptions[pos][word]
            return
        shorter = _shortened([word], pos)
        while shorter:
            yield from shorter
            shorter = _shortened(shorter, pos)


def _shortened(words: Sequence[str], pos: str) -> list[str]:
    return [word[: -len(end)] + new for word in words for end, new in ENDINGS[pos] if word.endswith(end)]


def _read_index(file: Path) -> dict[str, int]:
    """Lines: lemma pos n p pointer*p senses tagged offset*n; the licence stands on lines that begin with a space."""
    first = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                first[fields[0]] = int(fields[6 + int(fields[3])])
    except (OSError, ValueError, IndexError) as reason:
        raise UserError(f"synsets: {file}: not an index of WordNet ({reason}); name nltk's corpora/wordnet") from None
    return first


def _read_exceptions(file: Path) -> dict[str, list[str]]:
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {words[0]: words[1:] for words in lines if words}


def read_ids(file: Path) -> frozenset[int]:
    """The offsets of a list of ids such as n02084071.

    Raises:
        UserError: a line is none.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    try:
        return frozenset(int(line[1:]) for line in lines if line)
    except ValueError as reason:
        raise UserError(f"synsets: {file}: not a list of ids such as n02084071 ({reason})") from None


def read_names(file: Path) -> frozenset[str]:
    """The names of one word, of two letters or more, in timm's list `id TAB name, name, ...`; lower case."""
    lines = file.read_text(encoding="utf-8").splitlines()
    names = (name.strip().lower() for line in lines for name in line.split("\t", 1)[1].split(","))
    return frozenset(name for name in names if " " not in name and len(name) > 1)


def timm_list(name: str) -> Path:
    """A list that timm ships; found without importing it, which would load torch."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data" / "_info" / name
