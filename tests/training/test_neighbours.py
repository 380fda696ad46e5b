"""NegCLIP's hard pictures: found by brute force too, and in every batch beside the sample that they are near to."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from tests.conftest import gemsmith
from tests.training.conftest import write_shards
from training.config import LoaderConfig
from training.data import ImageSpec, Loader, Shards, fingerprint
from training.data.neighbours import find_neighbours

SPEC = ImageSpec(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
CONFIG = LoaderConfig(batch=16, chunk=4, neighbours=True, window_shards=2)
N, K = 60, 3


@pytest.fixture
def curated(tmp_path):
    """Shards, and a signal store that knows more samples than they hold, in parts, some without an embedding."""
    write_shards(tmp_path / "shards", [25, 35])
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N + 20, 16)).astype(np.float16)
    values[7] = values[3]  # copies are neighbours of each other
    uids = [f"{n:032x}" for n in range(N + 20)]
    order = rng.permutation(N + 20)
    for part, rows in enumerate(np.array_split(order, 3)):
        embedded = pa.FixedSizeListArray.from_arrays(pa.array(values[rows].reshape(-1)), 16)
        table = pa.table({"uid": [uids[i] for i in rows], "clip_image_embedding": embedded, "clip_score": rows * 0.01})
        (tmp_path / "signals" / "a").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "signals" / "a" / f"{part}.parquet")
    pq.write_table(pa.table({"uid": uids}), tmp_path / "signals" / "other.parquet")
    return tmp_path, values[:N].astype(np.float64)


def cosines(values):
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    found = unit @ unit.T
    np.fill_diagonal(found, -2)
    return found


def test_neighbours_are_those_of_all_pairs(curated):
    folder, values = curated
    gemsmith("neighbours", "--shards", folder / "shards", "--signals", folder / "signals")
    found = np.load(folder / "shards" / "neighbours.npy")
    every = cosines(values)
    assert found.shape == (N, K) and all(len(set(row)) == K for row in found.tolist())
    best = -np.sort(-every, axis=1)[:, :K]
    assert np.allclose(np.take_along_axis(every, found, 1), best, atol=1e-6) and best.min() > -2
    assert found[3, 0] == 7 and found[7, 0] == 3
    paths = {"data": str(folder / "shards")}
    before = fingerprint(CONFIG, paths)
    assert len(before) == 3 and len(fingerprint(dataclasses.replace(CONFIG, neighbours=False), paths)) == 2


def test_every_second_sample_is_a_neighbour_of_the_one_before_it(curated):
    folder, _ = curated
    near = find_neighbours(folder / "shards", folder / "signals")
    samples = Shards(folder / "shards")
    number = {samples.key(i): i for i in range(N)}
    alone = dataclasses.replace(CONFIG, neighbours=False, batch=8)
    plain = Loader(samples, alone, SPEC, lambda _: {}, seed=1, rank=0, world_size=1)
    chosen, batches = {}, 3 * N * 2 // 16
    for world in (1, 2):
        loaders = [Loader(samples, CONFIG, SPEC, lambda _: {}, seed=1, rank=r, world_size=world) for r in range(world)]
        for batch in range(batches):
            keys = [number[key] for key in loaders[0].ids(batch)]
            assert keys == [number[key] for key in loaders[-1].ids(batch)]
            assert keys[::2] == [number[key] for key in plain.ids(batch)], "the drawn ones come as they would alone"
            for drawn, beside in zip(keys[::2], keys[1::2]):
                assert beside in near[drawn]
                chosen.setdefault(drawn, set()).add(beside)
        first = [next(loader.batches(0, 1)) for loader in loaders]
        groups = np.concatenate([chunk["groups"] for chunks in first for chunk in chunks])
        assert len(groups) == 16
    assert len(chosen) == N and np.mean([len(found) > 1 for found in chosen.values()]) > 0.7, "another in each epoch"


def test_what_cannot_be_is_one_line(curated):
    folder, _ = curated
    shards, signals = folder / "shards", folder / "signals"
    for call, named in [
        (lambda: find_neighbours(shards, signals, "sharpness"), "no column sharpness"),
        (lambda: find_neighbours(shards, signals, "clip_score"), "holds no embeddings"),
        (lambda: find_neighbours(shards, signals, k=N), f"--k {N}: .* holds {N} samples"),
        (lambda: find_neighbours(shards, signals / "a" / "..", "clip_image_embedding", 0), "--k 0"),
        (lambda: Loader(Shards(shards), CONFIG, SPEC, dict, seed=0, rank=0, world_size=1), "gemsmith neighbours"),
        (lambda: dataclasses.replace(CONFIG, batch=15).check(), "loader.neighbours: go by twos"),
    ]:
        with pytest.raises(UserError, match=named) as error:
            call()
        assert "\n" not in str(error.value)
    (signals / "a" / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"of 60 samples of .* have no clip_image_embedding"):
        find_neighbours(shards, signals)
    np.save(shards / "neighbours.npy", np.zeros((5, 3), np.int32))
    with pytest.raises(UserError, match="is of 5 samples, not 60"):
        Loader(Shards(shards), CONFIG, SPEC, dict, seed=0, rank=0, world_size=1)
