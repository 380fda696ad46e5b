"""Complexity and actions of a caption: the CA of the CAT filter (Radenovic et al. 2023, arXiv 2301.02280).

Both come from a dependency tree: complexity is the most children that any of
its words has, and an action is a verb with a subject (`nsubj`) of its own. The
paper parses with spaCy. Any spaCy pipeline with a tagger and a parser serves by
its name or path; by itself this uses the small grammar in
`curation.signals.grammar`, which needs nothing and is for English alone.

The grammar and a parser agree on most actions, and less often on the exact
complexity: cut with the one that you measured with. The T, text-spotting, drops
captions that say what is written in the picture and needs a reader of text: not
here.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curation.errors import UserError, one_line
from curation.hashing import file_hash
from curation.signals.grammar import parse
from curation.signals.interface import Decoded

BUILTIN = "builtin"
LONGEST = 10_000  # characters of a caption that are parsed; spaCy refuses a million


@dataclass(frozen=True, kw_only=True)
class Cat:
    """Columns `caption_complexity` and `caption_actions` (int32).

    `model`: "builtin", or a spaCy pipeline by name or path, such as en_core_web_trf, which needs
    `pip install gemsmith[spacy]` and the pipeline.
    """

    model: str = BUILTIN
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"caption_complexity": pa.int32(), "caption_actions": pa.int32()}

    def content(self) -> dict[str, Any]:
        """The model; of one of spaCy's its version, or what its folder holds, and spaCy's version."""
        if self.model == BUILTIN:
            return {"model": BUILTIN}
        if importlib.util.find_spec("spacy") is None:
            raise _not_installed(self.model)
        if Path(self.model).is_dir():
            made = file_hash(sorted(file for file in Path(self.model).rglob("*") if file.is_file()))
        else:
            try:
                made = f"{self.model} {version(self.model)}"
            except PackageNotFoundError:
                raise _not_loaded(self.model, "no such package or folder") from None
        return {"model": made, "spacy": version("spacy")}

    def made_by(self) -> str:
        if self.model == BUILTIN:
            return "the built-in grammar, in place of spaCy"
        spacy, model = self.content()["spacy"], self.content()["model"]
        return f"spaCy {spacy} with {Path(self.model).name if Path(self.model).is_dir() else model}"

    def load(self, name: str) -> "CatMeter":
        return CatMeter(_builtin if self.model == BUILTIN else _spacy(self.model))


class CatMeter:
    """`count(captions)` gives (complexity, actions) of each."""

    def __init__(self, count: Callable[[Sequence[str]], list[tuple[int, int]]]) -> None:
        self._count = count

    def see(self, sample: Decoded) -> str:
        return sample.caption[:LONGEST]

    def columns(self, seen: Sequence[str]) -> dict[str, pa.Array]:
        complexity, actions = zip(*self._count(seen), strict=True)
        return {
            "caption_complexity": pa.array(complexity, pa.int32()),
            "caption_actions": pa.array(actions, pa.int32()),
        }


def _builtin(captions: Sequence[str]) -> list[tuple[int, int]]:
    trees = [parse(caption) for caption in captions]
    return [(tree.complexity(), len(tree.actions)) for tree in trees]


def _spacy(model: str) -> Callable[[Sequence[str]], list[tuple[int, int]]]:
    pipeline = load_pipeline(model)

    def count(captions: Sequence[str]) -> list[tuple[int, int]]:
        counts = []
        for document in pipeline.pipe(captions):
            verbs = {word.head.i for word in document if word.dep_ == "nsubj" and word.head.pos_ == "VERB"}
            counts.append((max((word.n_lefts + word.n_rights for word in document), default=0), len(verbs)))
        return counts

    return count


def load_pipeline(model: str) -> Any:
    """A spaCy pipeline by name or path, without what neither trees nor parts of speech need.

    Raises:
        UserError: spaCy is not installed, or cannot load it.
    """
    try:
        import spacy
    except ImportError:
        raise _not_installed(model) from None
    try:
        return spacy.load(model, exclude=["ner", "lemmatizer"])
    except (OSError, ValueError) as reason:
        raise _not_loaded(model, one_line(reason, 200)) from None


def _not_installed(model: str) -> UserError:
    return UserError(
        f"cat: model {model} needs spaCy, which is not installed; "
        "run `pip install gemsmith[spacy]`, or use model: builtin"
    )


def _not_loaded(model: str, reason: str) -> UserError:
    return UserError(
        f"cat: model {model}: spaCy cannot load it ({reason}); run `python -m spacy download {model}`, or name a path"
    )
