"""ImageNet's words in captions against nltk, DataComp's own reader of WordNet, on a small WordNet written here."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.signals.synsets import LEMMAS, SPEECH, Synsets, WordNet, read_ids, read_names, timm_list
from tests.curation.conftest import sample, write_tar
from tests.curation.test_signals import measure_alone

STEMS = [
    "dog",
    "run",
    "man",
    "men",
    "box",
    "wolf",
    "wol",
    "fly",
    "fli",
    "church",
    "fast",
    "glass",
    "bus",
    "mean",
    "bee",
]
ENDS = [
    "",
    "s",
    "es",
    "ses",
    "ves",
    "xes",
    "ches",
    "shes",
    "men",
    "man",
    "ies",
    "y",
    "e",
    "ed",
    "ing",
    "er",
    "est",
    "ss",
]
GLUE = [*[" "] * 9, "\n", "\u3000", "\u00a0", "\x1c", "\u200b", ", ", "'s ", "_", "-", ".", "\u0301 "]
EDGES = [
    *("", " ", "\n\t", "DOG", "dog dog dog", "dogſ", "ﬂy", "İbus", "bus\x00", "狗", "dog.n.01", "s", "es", "x" * 5_000),
]
LETTER = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet of words that run into each other by their endings, in the format of Princeton's wndb(5)."""
    folder = tmp_path_factory.mktemp("wordnet")
    rng = np.random.default_rng(0)
    words = sorted({stem + end for stem in STEMS for end in ENDS})
    for pos, letter in LETTER.items():
        chosen = sorted(rng.choice(words, 120, replace=False).tolist())
        data, offsets = "  1 WordNet 3.0 Copyright: nltk looks for this line\n", []
        for word in chosen:
            offsets.append(len(data))
            frames = " 00" if pos == "verb" else ""
            data += f"{len(data):08d} 03 {letter} 01 {word} 0 000{frames} | what {word} means\n"
        index = "  1 This is the licence.\n"
        for word, offset in zip(chosen, offsets):
            others = rng.choice(offsets, rng.integers(0, 3)).tolist()
            pointers = ["@", "~", "+"][: rng.integers(0, 4)]
            numbers = [f"{o:08d}" for o in (offset, *others)]
            index += " ".join([word, letter, str(len(numbers)), str(len(pointers)), *pointers, str(len(numbers)), "0"])
            index += f" {' '.join(numbers)}  \n"
        (folder / f"data.{pos}").write_text(data)
        (folder / f"index.{pos}").write_text(index)
        odd = rng.choice(words, 30, replace=False)
        exceptions = [f"{word} {' '.join(rng.choice(words, rng.integers(1, 3)))}\n" for word in odd]
        (folder / f"{pos}.exc").write_text("".join(exceptions))
    (folder / "lexnames").write_text("".join(f"{n:02d}\tnoun.x\t1\n" for n in range(45)))  # nltk alone reads these two
    (folder / "cntlist.rev").write_text("")
    return folder


@pytest.fixture(scope="module")
def nltk(wordnet: Path) -> WordNetCorpusReader:
    with pytest.warns(UserWarning):
        return WordNetCorpusReader(str(wordnet), None)


@pytest.fixture(scope="module")
def ours(wordnet: Path) -> WordNet:
    return WordNet.read(wordnet)


@settings(max_examples=1_000, deadline=None)
@given(
    word=st.builds("".join, st.tuples(st.sampled_from(STEMS), st.lists(st.sampled_from(ENDS), max_size=3).map("".join)))
)
def test_the_first_synset_is_nltks(ours: WordNet, nltk: WordNetCorpusReader, word: str) -> None:
    found = nltk.synsets(word)
    assert ours.first_offset(word) == (found[0].offset() if found else None)


def test_captions_as_datacomp_judges_them(
    wordnet: Path, ours: WordNet, nltk: WordNetCorpusReader, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    every = [offset for pos in SPEECH for offset in ours.first[pos].values()]
    chosen = sorted(set(rng.choice(every, 100).tolist()))
    (tmp_path / "ids.txt").write_text("".join(f"n{offset:08d}\n" for offset in chosen))
    words, cased = [stem + end for stem in STEMS for end in ENDS], [str.upper, str.title, str.swapcase, str]
    captions = [*EDGES, *(edge.join(words[:40]) for edge in EDGES)]
    for _ in range(10_000 - len(captions)):
        parts = [cased[rng.integers(4)](words[i]) for i in rng.integers(0, len(words), rng.integers(0, 6))]
        captions.append("".join(part + GLUE[rng.integers(len(GLUE))] for part in parts))
    meter = Synsets(wordnet=str(wordnet), synsets=str(tmp_path / "ids.txt")).load("in21k")
    seen = meter.columns([meter.see(SimpleNamespace(caption=caption)) for caption in captions])["in21k"].to_pylist()

    @cache
    def counts(word: str) -> bool:
        found = nltk.synsets(word)
        return bool(found) and found[0].offset() in chosen

    assert seen == [sum(map(counts, caption.split())) for caption in captions]
    assert 1_000 < sum(n > 0 for n in seen) < 9_000 and max(seen) > 3


def test_without_wordnet_the_names_of_classes_count(tmp_path: Path) -> None:
    captions = ["A DOG", "dogs and churches", "ostrich\ttables", "hot dog", "of and the", "a b c", "", "sheepdogs."]
    write_tar(tmp_path / "pool" / "0.tar", {str(i): sample(i, txt=c.encode()) for i, c in enumerate(captions)})
    rows = measure_alone(tmp_path / "pool", tmp_path / "out", {"in21k": {"kind": "synsets"}})
    assert [row["in21k"] for row in rows] == [1, 2, 2, 1, 0, 0, 0, 0]
    names = read_names(timm_list(LEMMAS))
    assert {"dog", "church"} <= names and not {"a", "hot dog", "Dog"} & names


def test_timms_ids_are_imagenet_21k() -> None:
    ids = read_ids(Synsets()._ids())
    assert len(ids) == 21_843 and {2084071, 1503061} <= ids  # dog, bird


def test_what_cannot_be_read_is_refused(wordnet: Path, tmp_path: Path) -> None:
    def refused(message: str, **chosen: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_config({"signals": {"s": {"kind": "synsets", **chosen}}}).signals["s"].load("s")

    refused("ids.txt needs WordNet", synsets="ids.txt")
    refused(r"index\.noun: no such file; name nltk's corpora/wordnet folder", wordnet=str(tmp_path))
    refused(r"none\.txt: no such file; name a file of ids", wordnet=str(wordnet), synsets=str(tmp_path / "none.txt"))
    (tmp_path / "ids.txt").write_text("n01\nn 2x\n")
    refused("not a list of ids such as n02084071", wordnet=str(wordnet), synsets=str(tmp_path / "ids.txt"))
    for file in wordnet.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "index.verb").write_text("run v 1\n")
    refused(r"index\.verb: not an index of WordNet", wordnet=str(tmp_path))


def test_which_source_was_used_is_in_the_identity(wordnet: Path) -> None:
    contents = [Synsets().content(), Synsets(wordnet=str(wordnet)).content()]
    assert [content["source"] for content in contents] == ["names", "wordnet"]


def test_the_recipe() -> None:
    config = load_config(Path("recipes/curate/datacomp_text_based.yaml"))
    assert list(config.selectors) == ["language", "imagenet21k"] and config.signals["imagenet21k_words"] == Synsets()
