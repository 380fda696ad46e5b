"""Hard negative captions as NegCLIP makes them: two parts of one kind change places (arXiv 2210.01936, section 4).

    a black cat sits on a white chair -> a white cat sits on a black chair

A tagger gives every word one letter; kinds of parts are patterns over these
letters, those of the paper's code: nouns with nouns (of one number), adjectives,
adverbs, verb phrases, and noun phrases of three words or more. The tagger is
curation's small grammar, or a spaCy pipeline (the paper: en_core_web_lg).

Beyond the paper, a swap that says the same in another order is none: "a cat
and a dog", "black and white". Which swap a caption gets is drawn from (seed,
epoch, uid), so that results depend on no rank, thread or chunk.
"""

import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from curation.hashing import hash64
from curation.signals.cat import BUILTIN, load_pipeline
from curation.signals.grammar import WORD, plural, tags_of
from training.data.loader import Chunk, Drawn

Tagger = Callable[[str], tuple[list[tuple[int, int]], str]]
"""caption -> the bounds of its words, and a letter for each: N noun, S nouns (plural), A what stands before a noun or
after "is", V verb, X auxiliary, R adverb, D determiner, C coordination, "." mark, O other."""

KINDS = {
    "noun": (re.compile("N"), "NS"),
    "nouns": (re.compile("S"), "NS"),
    "adjective": (re.compile("A"), "A"),
    "adverb": (re.compile("R"), "R"),
    "verb phrase": (re.compile("[RX]*V"), "RXV"),
    "noun phrase": (re.compile("D*[ANS]*[NS]"), "ANS"),
}
"""Patterns of parts, and what may stand between two of them in a list."""
LONGEST = 1_000  # characters of a caption that are looked at


COLOURS = frozenset(
    ("black", "white", "red", "blue", "green", "yellow", "brown", "orange", "pink", "purple", "grey", "gray", "tan")
)


def builtin(caption: str) -> tuple[list[tuple[int, int]], str]:
    """A `Tagger` by curation's grammar, which knows no adjectives: what stands before a noun is one, and colours."""
    found = list(WORD.finditer(caption))
    words = [match[0].lower() for match in found]
    letters = list(re.sub("N(?=N)|(?<=B)N", "A", "".join(tags_of(words))).translate(TO_LETTERS))
    for place, (word, letter) in enumerate(zip(words, letters)):
        if word[0] in "'’":
            letters[place] = "O"
        elif word in COLOURS:
            letters[place] = "A"
        elif letter == "N" and word.endswith("ed") and len(word) > 4:
            letters[place] = "V"  # "dressed", "is followed"
        elif letter == "N" and plural(word):
            letters[place] = "S"
    return [match.span() for match in found], "".join(letters)


TO_LETTERS = str.maketrans("FGBHPSW", "VVXXOOO")
SPACY = {"ADJ": "A", "NUM": "A", "ADV": "R", "VERB": "V", "AUX": "X", "DET": "D", "CCONJ": "C", "PUNCT": "."}
SPACY_TAGS = {"NN": "N", "NNS": "S", "PRP$": "D"}


def tagger_of(model: str) -> Tagger:
    """ "builtin", or a spaCy pipeline by name or path.

    Raises:
        UserError: spaCy is not installed, or cannot load it.
    """
    if model == BUILTIN:
        return builtin
    pipeline, turn = load_pipeline(model), threading.Lock()  # its vocabulary grows as it reads

    def tagged(caption: str) -> tuple[list[tuple[int, int]], str]:
        with turn:
            words = [word for word in pipeline(caption) if not word.is_space]
        letters = [SPACY_TAGS.get(word.tag_) or SPACY.get(word.pos_, "O") for word in words]
        return [(word.idx, word.idx + len(word)) for word in words], "".join(letters)

    return tagged


def swapped(caption: str, count: int, draw: int, tagger: Tagger = builtin) -> list[str]:
    """Up to `count` different captions, each with two parts of one kind in each other's place; fewer where there are
    no more. As in the paper each kind that is there is equally likely, and within it each pair.

    Args:
        draw: the random number of this row, hash64(seed, epoch, uid).
    """
    caption, rest = caption[:LONGEST], caption[LONGEST:]
    bounds, letters = tagger(caption)
    left = {kind: pairs for kind in KINDS if (pairs := _pairs(kind, letters))}
    rng = np.random.default_rng(hash64(draw, "swaps"))
    found: list[str] = []
    while left and len(found) < count:
        kind = list(left)[int(rng.integers(len(left)))]
        first, second = left[kind].pop(int(rng.integers(len(left[kind]))))
        if not left[kind]:
            del left[kind]
        a, b, c, d = bounds[first[0]][0], bounds[first[1] - 1][1], bounds[second[0]][0], bounds[second[1] - 1][1]
        earlier, later = caption[a:b], caption[c:d]
        if earlier.lower() == later.lower():
            continue
        if a == 0 and earlier[0].isupper():  # a capital stays at the beginning, or case would tell
            earlier, later = earlier[0].lower() + earlier[1:], later[0].upper() + later[1:]
        text = caption[:a] + later + caption[b:c] + earlier + caption[d:] + rest
        if text not in found:
            found.append(text)
    return found


def _pairs(kind: str, letters: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of parts, as bounds in words, of which the sentence says different things."""
    pattern, listed = KINDS[kind]
    parts = [match.span() for match in pattern.finditer(letters)]
    if kind == "noun phrase":
        parts = [(start, stop) for start, stop in parts if stop - start > 2]
    pairs = itertools.combinations(parts, 2)
    return [(a, b) for a, b in pairs if not _same(kind, letters[: a[0]], letters[a[1] : b[0]], listed)]


def _same(kind: str, before: str, between: str, listed: str) -> bool:
    """Whether the two are parts of a list, in which order alone would change: only "and", marks, articles and more of
    the kind stand between, and a noun leaves no adjective of its own behind."""
    modified = kind in ("noun", "nouns") and before[-1:] in ("A", "N", "S")
    return not set(between) - set("CD." + listed) and not modified


@dataclass(frozen=True, slots=True)
class Swaps:
    """A family's `extra`: `count` hard negatives for each row of a chunk of pairs.

    encode_text: the family's, captions -> tensors [n, ...].
    """

    count: int
    tagger: Tagger
    encode_text: Callable[[list[str]], Chunk]

    def __call__(self, kind: str, rows: Sequence[Drawn]) -> Chunk:
        """ "negative.NAME" [c, count, ...] for each tensor of `encode_text`, and "right_valid" bool [c, 1 + count]:
        false where a caption has no (further) swap, or one that only a longer model would see."""
        texts: list[str] = []
        there = torch.zeros(len(rows), 1 + self.count, dtype=torch.bool)
        for number, row in enumerate(rows):
            text = row.fields.get("text", "")
            own = [] if row.reason else [text, *swapped(text, self.count, row.draw, self.tagger)]
            there[number, : len(own)] = True
            texts += own + [""] * (1 + self.count - len(own))
        encoded = {
            name: x.unflatten(0, (len(rows), -1)) for name, x in self.encode_text(texts).items()
        }  # [c, 1 + k, ...]
        same = [x[:, 1:] == x[:, :1] for x in encoded.values()]
        there[:, 1:] &= ~torch.stack([x.flatten(2).all(-1) if x.ndim > 2 else x for x in same]).all(0)
        return {**{f"negative.{name}": x[:, 1:].contiguous() for name, x in encoded.items()}, "right_valid": there}
