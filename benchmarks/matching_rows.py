"""Concepts in captions, 500,000 of them, against the ways MetaCLIP looks for them; and Ray against a bare pool.

Entries and captions are made of the same invented words, the frequent ones far
more often than the rare, so that a caption names about a dozen entries, as
captions of the web do with MetaCLIP's list.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.building_rows import noise_pool
from benchmarks.case import Bench, Case
from benchmarks.curation_rows import CORES
from curation.signals.concepts import ConceptsMeter, normal_form, read_entries
from curation.tar import samples
from curation.workers import Workers

Match = Callable[[str], Any]


def matching(bench: Bench) -> Iterator[Case]:
    captions, few = (400, 4) if bench.quick else (40_000, 20)
    metadata = bench.work / "metadata.json"
    texts = _write_concepts(metadata, 2_000 if bench.quick else 500_000, captions)
    entries = read_entries(str(metadata))
    ours = ConceptsMeter(entries, "concepts").match
    theirs = _as_metaclip(entries)
    spaced = [f" {entry} " for entry in entries]

    def naive(caption: str) -> list[int]:
        text = normal_form(caption)
        return [i for i, entry in enumerate(spaced) if entry in text]

    assert all(ours(text) == naive(text) for text in texts[:few]), "the same work"
    shared: dict[str, Any] = {"area": "curation", "unit": "captions/s", "better": "higher"}
    size = f"{len(entries):,} entries"
    yield Case(
        name="concepts_naive",
        reach=2_000.0,
        peer_name=f"each of {size} looked for by `in`, timed on {few} captions",
        ours=lambda: _speed(ours, texts),
        peer=lambda: _speed(naive, texts[:few]),
        **shared,
    )
    yield Case(
        name="concepts_pyahocorasick",
        reach=1.0,
        peer_name=f"MetaCLIP's way: pyahocorasick over {size}, the ids of what it finds as a set",
        ours=lambda: _speed(ours, texts),
        peer=lambda: _speed(theirs, texts),
        **shared,
    )
    (bench.work / "captions.json").write_text(json.dumps(texts * 5))  # seconds of work, beside which a call is little
    with Workers(2, None) as workers:

        def spread(count: int) -> float:
            """On so many of Ray's workers, which keep captions and automatons from run to run. Captions a second."""
            began = time.perf_counter()
            matched = sum(workers.map(_Matching(bench.work), [slice(i, None, count) for i in range(count)]))
            assert matched == 5 * len(texts)
            return matched / (time.perf_counter() - began)

        yield Case(
            name="concepts_2_workers",
            reach=1.7,
            peer_name="one worker",
            ours=lambda: spread(2),
            peer=lambda: spread(1),
            **shared,
        )


class _Matching:
    """What a worker is given: matches the captions of a slice and says how many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> Callable[[slice], int]:
        match, captions = _held(self._folder)
        return lambda part: sum(match(caption) is not None for caption in captions[part])


@lru_cache(maxsize=1)
def _held(folder: Path) -> tuple[Match, list[str]]:
    entries = read_entries(str(folder / "metadata.json"))
    return ConceptsMeter(entries, "concepts").match, json.loads((folder / "captions.json").read_text())


def _as_metaclip(entries: Sequence[str]) -> Match:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for i, entry in enumerate(entries):
        automaton.add_word(f" {entry} ", (i, entry))
    automaton.make_automaton()

    def match(caption: str) -> set[int]:
        return {i for _, (i, _) in automaton.iter(normal_form(caption))}

    return match


def _speed(match: Match, captions: Sequence[str]) -> float:
    """Captions a second."""
    began = time.perf_counter()
    for caption in captions:
        match(caption)
    return len(captions) / (time.perf_counter() - began)


def _write_concepts(file: Path, entries: int, captions: int) -> list[str]:
    """Write a metadata.json of so many entries, and give captions of 3 to 20 words."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (entries // 3 + 50, 9), np.uint8)
    lengths = rng.integers(2, 10, len(letters))
    words = list(dict.fromkeys(bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)))

    def phrases(lengths: np.ndarray) -> list[str]:
        drawn = (rng.pareto(0.7, lengths.sum()) * 20 % len(words)).astype(int)  # the first words far more often
        return [" ".join(words[i] for i in group) for group in np.split(drawn, np.cumsum(lengths)[:-1])]

    found = dict.fromkeys(words)
    while len(found) < entries:
        found.update(dict.fromkeys(phrases(rng.integers(2, 4, entries))))
    file.write_text(json.dumps(list(found)[:entries]))
    return [f"{phrase}." for phrase in phrases(rng.integers(3, 20, captions))]


def spreading(bench: Bench) -> Iterator[Case]:
    """The least a pipeline does, listing what lies in shards, spread by Ray and by a pool of processes."""
    pool = bench.work / "pool"
    noise_pool(pool, shards=2, samples=50 if bench.quick else 1_000)
    tars = [str(path) for path in sorted(pool.glob("*.tar"))] * (2 if bench.quick else 40)
    expected = len(tars) * (50 if bench.quick else 1_000)
    with Workers(CORES, None) as workers, multiprocessing.get_context("spawn").Pool(CORES) as bare:

        def by(spread: Callable[[], Iterator[int]]) -> float:
            began = time.perf_counter()
            assert sum(spread()) == expected
            return expected / (time.perf_counter() - began)

        yield Case(
            name="ray_nothing",
            area="curation",
            unit="samples/s",
            better="higher",
            reach=0.9,
            peer_name=f"multiprocessing.Pool of {CORES} that does the same; a shard of 1,000 samples an item",
            ours=lambda: by(lambda: workers.map(_listing, tars)),
            peer=lambda: by(lambda: bare.imap_unordered(_listed, tars)),
        )


def _listing() -> Callable[[str], int]:
    return _listed


def _listed(path: str) -> int:
    return len(samples(Path(path).read_bytes())[0])
