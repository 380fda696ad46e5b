"""Several sources in one run: exact shares, every sample once an epoch of its source, one batch for any world size."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from tests.training.conftest import write_shards
from training.config import LoaderConfig, SourceConfig
from training.data import ImageSpec, Loader, Mixture, Shards, Source, named

SPEC = ImageSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
MIXINGS = st.sampled_from(["shares", "random", "round_robin"])
WEIGHTS = st.lists(st.sampled_from([1.0, 2.0, 0.5, 0.3, 3.0]), min_size=1, max_size=4)


def mixture(weights, mixing, unit=1, seed=0):
    weights = {f"s{i}": 1.0 if mixing == "round_robin" else w for i, w in enumerate(weights)}
    return Mixture(weights, seed=seed, unit=unit, mixing=mixing)


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, mixing=MIXINGS, unit=st.integers(1, 5), seed=st.integers(0, 9), start=st.integers(0, 5000))
def test_every_source_counts_on_without_gap_from_any_position(weights, mixing, unit, seed, start):
    end = 3 * unit * 1024
    source, own = mixture(weights, mixing, unit, seed)(np.arange(end))
    for s in range(len(weights)):
        assert np.array_equal(own[source == s], np.arange((source == s).sum()))
    assert (source.reshape(-1, unit) == source[::unit, None]).all(), "a unit is of one source"
    start = min(start, end - 1)
    alone = mixture(weights, mixing, unit, seed)(np.arange(start, min(end, start + 50)))
    assert np.array_equal(alone, (source[start : start + 50], own[start : start + 50]))


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 9), block=st.integers(0, 10**9))
def test_shares_are_exact_in_every_block(weights, seed, block):
    mix = mixture(weights, "shares", seed=seed)
    source, own = mix(block * mix.length + np.arange(mix.length))
    counts = np.bincount(source, minlength=len(weights))
    assert np.allclose(counts / mix.length, np.array(weights) / sum(weights), rtol=0, atol=1e-12)
    assert own.min() >= block, "each source gave some in every earlier block"


def test_blocks_differ_and_round_robin_takes_turns():
    mix = mixture([1.0, 1.0, 1.0], "shares")
    assert len({tuple(mix(b * 3 + np.arange(3))[0]) for b in range(60)}) == 6, "all orders occur"
    assert mixture([1.0, 1.0], "round_robin", unit=2)(np.arange(8))[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_random_units_are_independent_draws_even_far_away():
    far = 3 * 2**29 + 12_345 * 1024
    for start in (0, far):
        source, own = mixture([3.0, 1.0], "random", seed=4)(start + np.arange(200 * 1024))
        blocks = (source == 0).reshape(200, 1024).sum(1)
        assert abs(source.mean() - 0.25) < 4 * np.sqrt(0.75 * 0.25 / source.size)
        assert 0.7 < blocks.var() / (1024 * 0.75 * 0.25) < 1.4, "counts of blocks vary as those of coins: 4 sigma"
        pairs = np.mean(source[1:] == source[:-1])
        assert abs(pairs - (0.75**2 + 0.25**2)) < 4 * 0.5 / np.sqrt(source.size)
        assert abs(own[source == 1][0] - start / 4) < 4 * np.sqrt(max(start, 1) * 0.75 * 0.25) + 1_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("sources")
    return {"a": write_shards(base / "a", [10, 7]), "b": write_shards(base / "b", [5, 6, 2])}


def encode(captions):
    return {"input_ids": torch.tensor([int(c.split()[1]) if c else -1 for c in captions])}


def loader(folders, kinds, rank=0, world_size=1, **changes):
    config = dataclasses.replace(LoaderConfig(batch=12, chunk=4, window_shards=2), **changes)
    sources = [
        Source(name=n, samples=Shards(folders[n]), kind=kinds[n], weight=1.0 if changes.get("mixing") else w)
        for n, w in (("a", 2.0), ("b", 1.0))
    ]
    return Loader(sources, config, SPEC, encode, seed=5, rank=rank, world_size=world_size)


def kind_of(chunk):
    return ("pixel_values" in chunk, "input_ids" in chunk)


def content(batches):
    """By batch and kind, what the valid rows show, in order."""
    found = []
    for chunks in batches:
        by_kind = {}
        for c in chunks:
            rows = c["input_ids"] if "input_ids" in c else c["pixel_values"].mean((1, 2, 3))
            by_kind.setdefault(kind_of(c), []).extend(r for r, v in zip(rows.tolist(), c["valid"].tolist()) if v)
        found.append(by_kind)
    return found


@pytest.mark.parametrize("kinds", [{"a": "pairs", "b": "pairs"}, {"a": "images", "b": "texts"}])
def test_batches_of_several_sources_are_the_same_for_any_world_size_and_start(folders, kinds):
    whole = content(loader(folders, kinds, threads=3).batches(0, 12))
    for world in (2, 5):
        ranks = [list(loader(folders, kinds, r, world).batches(0, 12)) for r in range(world)]
        shapes = [[[(kind_of(c), len(c["valid"])) for c in chunks] for chunks in rank] for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes), "every rank runs the same chunks"
        parts = [content(rank) for rank in ranks]
        for number, batch in enumerate(whole):
            for kind, rows in batch.items():
                assert [x for part in parts for x in part[number].get(kind, [])] == rows
    assert content(loader(folders, kinds).batches(7, 12)) == whole[7:]


def test_each_source_gives_its_samples_once_an_epoch(folders):
    it = loader(folders, {"a": "pairs", "b": "pairs"}, batch=6)
    drawn = [(s, it.sources[s].samples.key(it._sample(s, own)[1])) for b in range(30) for _, s, own in it._drawn(b)]
    for source, folder in enumerate(("a", "b")):
        keys = [key for s, key in drawn if s == source]
        size = len(Shards(folders[folder]))
        assert len(keys) == (120 if folder == "a" else 60), "shares of 2 : 1"
        for epoch in range(len(keys) // size):
            assert len(set(keys[epoch * size : (epoch + 1) * size])) == size


def test_a_unit_as_large_as_the_batch_gives_steps_of_one_kind(folders):
    it = loader(folders, {"a": "images", "b": "texts"}, unit=12, mixing="round_robin")
    kinds = [{kind_of(c) for c in chunks} for chunks in it.batches(0, 6)]
    assert kinds == [{(True, False)}, {(False, True)}] * 3


class Rows:
    """A source that is no folder of tars: a text alone by number."""

    sizes = np.array([9])

    def key(self, i):
        return f"row{i}"

    def sample(self, i):
        if i == 4:
            raise RuntimeError("a reader of its own kind")
        return {"uid": self.key(i), "number": i}

    def ahead(self, parts):
        pass


def test_rows_of_another_reader_become_what_the_family_makes_of_them():
    config = LoaderConfig(batch=9, chunk=4)

    def extra(kind, rows):
        assert kind == "rows"
        numbers, draws = [r.fields.get("number", -1) for r in rows], [r.draw % 97 for r in rows]
        return {"n": torch.tensor(numbers), "d": torch.tensor(draws)}

    made = Loader([Source(name="r", samples=Rows(), kind="rows")], config, SPEC, encode, seed=1, rank=0, world_size=1,
                  extra=extra)  # fmt: skip
    first, second = list(made.batches(0, 2))
    assert sorted(n for c in first for n in c["n"].tolist()) == [-1, 0, 1, 2, 3, 5, 6, 7, 8]
    assert made.holes == {"unreadable": 2} and set(first[0]) == {"valid", "groups", "draws", "n", "d"}
    draws = [{int(n): int(d) for c in b for n, d in zip(c["n"], c["d"]) if n >= 0} for b in (first, second)]
    assert draws[0] != draws[1], "another epoch, other draws"
    groups = [g for c in first for g in c["groups"][c["valid"]].tolist()]
    assert len(set(groups)) == 8, "rows without a group of their own are each its own"


def test_chunks_are_prepared_beside_each_other():
    """A family's `extra` may be slow (a VLM's image processor): two threads are in it at once, or neither gets on."""
    both = threading.Barrier(2, timeout=30)

    def extra(kind, rows):
        both.wait()
        return {"n": torch.tensor([r.fields.get("number", -1) for r in rows])}

    config, place = LoaderConfig(batch=8, chunk=4, threads=2), {"seed": 1, "rank": 0, "world_size": 1}
    made = Loader([Source(name="r", samples=Rows(), kind="rows")], config, SPEC, encode, **place, extra=extra)
    assert [len(c["n"]) for chunks in made.batches(0, 2) for c in chunks] == [4] * 4
    assert made.timers.seconds.keys() == {"read", "prepare"}


TWO = LoaderConfig(sources={"a": SourceConfig(path="x"), "b": SourceConfig()})


def test_data_words_name_sources():
    assert named(LoaderConfig(), ["d"]) == {"data": "d"}
    assert named(LoaderConfig(), ["a=d", "b=s3://e/f=g"]) == {"a": "d", "b": "s3://e/f=g"}
    assert named(LoaderConfig(), ["/a/b=c"]) == {"data": "/a/b=c"}
    assert named(TWO, ["b=y"]) == {"a": "x", "b": "y"} and named(TWO, ["a=z", "b=y"]) == {"a": "z", "b": "y"}
    assert named(LoaderConfig(sources={"a": SourceConfig()}), ["d"]) == {"a": "d"}
    streams = LoaderConfig(sources={kind: SourceConfig(kind=kind) for kind in ("pairs", "images", "texts")})
    assert named(streams, ["d"]) == {"pairs": "d", "images": "d", "texts": "d"}


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (LoaderConfig(), [], "--data: is missing"),
        (LoaderConfig(), ["d", "e"], "--data d: .*NAME=d"),
        (LoaderConfig(), ["a=d", "a=e"], "--data a=d: a second folder for a"),
        (TWO, ["d"], "--data d: .*NAME=d"),
        (TWO, ["c=d"], "no source c; it has a, b"),
        (TWO, ["a=d"], "loader.sources.b.path: is missing"),
    ],
)
def test_bad_data_words_are_one_clear_line(config, words, said):
    with pytest.raises(UserError, match=said) as raised:
        named(config, words)
    assert "\n" not in str(raised.value)


def test_bad_mixtures_are_one_clear_line():
    for config, said in [
        (LoaderConfig(sources={"a": SourceConfig(weight=0.0)}), "loader.sources.a.weight: 0 is not above 0"),
        (LoaderConfig(batch=10, unit=4), "loader.unit: 4 does not divide the batch of 10"),
        (LoaderConfig(sources={"a b": SourceConfig()}), "'a b' is no name"),
    ]:
        with pytest.raises(UserError, match=said):
            config.check()
    for weights, mixing, said in [
        ({"a": 1e-9, "b": 1.0}, "shares", "loader.sources.a.weight"),
        ({"a": 0.1234, "b": 5_000_001.0}, "shares", "round them"),
        ({"a": 1.0, "b": 2.0}, "round_robin", "loader.sources.b.weight: 2 has no effect"),
    ]:
        with pytest.raises(UserError, match=said):
            Mixture(weights, seed=0, unit=1, mixing=mixing)
