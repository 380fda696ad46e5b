"""A sound sample without an embedding, or without a hash, in the middle of the pool: every selector that reads them
gives the others what it gives them in a pool without it, by oracles that never see it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.manifest import write_manifest
from curation.selection import clustering
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.decontamination import Decontamination
from curation.selection.engine import Part
from curation.selection.image_based import ImageBased
from curation.selection.interface import Selector
from curation.selection.near_duplicates import NearDuplicates
from curation.selection.semantic_duplicates import SemanticDuplicates
from tests.curation import by_hand
from tests.curation.selecting import select
from tests.curation.test_selection import write_parts
from tests.curation.test_semantic import EPS, clusters_of, selector_of, unit

ROWS, WIDTH = 3_000, 16


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Clouds with near copies; each seventh row and a stretch of a hundred, a whole part of the pool, have nothing."""
    rng = np.random.default_rng(0)
    points = unit(rng.normal(size=(6, WIDTH)))[rng.integers(0, 6, ROWS)] + 0.12 * rng.normal(size=(ROWS, WIDTH))
    hashes = rng.integers(0, 2**63, ROWS, dtype=np.uint64)
    for i in range(1, ROWS, 2):
        of = rng.integers(max(0, i - 30), i)
        points[i] = points[of] + 0.04 * rng.normal(size=WIDTH)
        hashes[i] = hashes[of] ^ (np.uint64(1) << np.uint64(rng.integers(0, 63)))
    rows = np.arange(ROWS)
    holes = (rows % 7 == 3) | ((rows >= 1200) & (rows < 1300))
    return pa.table(
        {
            "uid": [f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)],
            "error": pa.array(["image_decode" if i % 50 == 0 else None for i in rows], pa.string()),
            "embedding": pa.array(unit(points).tolist(), pa.list_(pa.float16(), WIDTH), mask=holes),
            "phash": pa.array(hashes, mask=holes),
            "image_sha256": pa.array([int(i).to_bytes(32) for i in rows], pa.binary(32), mask=holes),
        }
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[Part]:
    return write_parts(tmp_path_factory.mktemp("parts"), table, [1, 1200, 1300, 2100])


@pytest.fixture(scope="module")
def there(table: pa.Table) -> np.ndarray:
    """The rows that oracles see, among all, without errors."""
    return np.flatnonzero(table["embedding"].is_valid().to_numpy() & table["error"].is_null().to_numpy())


def kept(selector: Selector, parts: list[Part], missing: bool, table: pa.Table) -> np.ndarray:
    """bool [rows], where sound rows without a value are all kept, or all dropped."""
    keeps = ~select({"it": selector}, parts, partition_rows=100).failed[:, 0]
    holes = table["embedding"].is_null().to_numpy() & table["error"].is_null().to_numpy()
    assert (keeps[holes] == missing).all() and holes.sum() > 400
    return keeps


def test_each_embedding_stays_in_its_row(table: pa.Table) -> None:
    for some in (table, table.slice(1250, 700), table.slice(1200, 100)):
        expected = [[np.nan] * WIDTH if row is None else row for row in some["embedding"].to_pylist()]
        found = clustering.embeddings(some, "embedding")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, np.array(expected, np.float16))


def test_semantic_duplicates(table: pa.Table, parts: list[Part], there: np.ndarray) -> None:
    keeps = kept(selector_of("semdedup"), parts, True, table)
    for rows, cosines in clusters_of(table.take(pa.array(there))):
        np.testing.assert_array_equal(keeps[there[rows]], np.triu(cosines, 1).max(axis=0) <= 1 - EPS)
    assert 0.1 < keeps[there].mean() < 0.9


def test_cluster_balance(table: pa.Table, parts: list[Part], there: np.ndarray) -> None:
    keeps = kept(ClusterBalance(column="embedding", clusters=8, cap=200, sample=2000, seed=5), parts, True, table)
    _, points, uids = by_hand.sound(table.take(pa.array(there)))
    nearest = (points @ by_hand.centroids(points, uids, clusters=8, sample=2000, seed=5).T).argmax(axis=1)
    expected: list[int] = []
    for cluster in range(8):
        members = np.flatnonzero(nearest == cluster).tolist()
        expected += sorted(members, key=lambda i: by_hand.hash64("5/cluster choice", uids[i]))[:200]
    np.testing.assert_array_equal(np.flatnonzero(keeps[there]), sorted(expected))
    assert 200 < len(expected) < len(there)


def test_image_based(table: pa.Table, parts: list[Part], there: np.ndarray, tmp_path: Path) -> None:
    _, points, _ = by_hand.sound(table.take(pa.array(there)))
    centroids = points[:40].astype(np.float32)
    np.save(tmp_path / "centroids.npy", centroids)
    np.save(tmp_path / "reference.npy", points[100:110].astype(np.float16))
    settings = {"column": "embedding", "reference": str(tmp_path / "reference.npy")}
    keeps = kept(ImageBased(centroids=str(tmp_path / "centroids.npy"), **settings), parts, False, table)
    nearest = (points @ centroids.T.astype(np.float64)).argmax(axis=1)
    np.testing.assert_array_equal(keeps[there], np.isin(nearest, nearest[100:110]))
    trained = kept(ImageBased(clusters=30, sample=2000, **settings), parts, False, table)
    assert trained[there[100:110]].all() and not trained[there].all()


def test_near_duplicates(table: pa.Table, parts: list[Part], there: np.ndarray) -> None:
    keeps = kept(NearDuplicates(distance=3), parts, True, table)
    hashes = np.array([table["phash"][i].as_py() for i in there], np.uint64)
    expected: list[int] = []
    for i in range(len(hashes)):
        if not expected or (np.bitwise_count(hashes[expected] ^ hashes[i]) > 3).all():
            expected.append(i)
    np.testing.assert_array_equal(np.flatnonzero(keeps[there]), expected)
    assert len(expected) < len(there)


def test_decontamination(table: pa.Table, parts: list[Part], there: np.ndarray, tmp_path: Path) -> None:
    reference = table.slice(1100, 300)  # with rows that have nothing, too
    pq.write_table(reference, tmp_path / "p.parquet")
    write_manifest(tmp_path / "measure.manifest.json", {"signal_set": str(tmp_path), "parts": ["p.parquet"]})
    asked = Decontamination(reference=str(tmp_path), phash_bits=3, cosine=0.99, column="embedding")
    keeps = kept(asked, parts, True, table)
    _, points, _ = by_hand.sound(table.take(pa.array(there)))
    hashes = np.array([table["phash"][i].as_py() for i in there], np.uint64)
    others = reference.filter(reference["embedding"].is_valid())
    theirs = unit(np.array(others["embedding"].to_pylist(), np.float64))
    near = (unit(points) @ theirs.T >= 0.99).any(axis=1)
    near |= (np.bitwise_count(hashes[:, None] ^ others["phash"].to_numpy()) <= 3).any(axis=1)
    np.testing.assert_array_equal(keeps[there], ~near)
    assert near[(there >= 1100) & (there < 1400)].all() and near.sum() < len(there)


def test_a_pool_of_nothing_else(table: pa.Table, tmp_path: Path) -> None:
    parts = write_parts(tmp_path, table.slice(1201, 40), [10])
    for selector in (
        SemanticDuplicates(column="embedding", clusters=3, eps=EPS),
        ClusterBalance(column="embedding", clusters=3, cap=1),
        NearDuplicates(),
    ):
        assert not select({"it": selector}, parts).failed.any()
