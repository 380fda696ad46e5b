"""Semantic duplicates against all pairs, and the image-based filter against a plain argmax."""

import pickle
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curation.config import parse_config
from curation.errors import UserError
from curation.manifest import write_manifest
from curation.selection import clustering, engine, semantic_duplicates
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.engine import Part
from curation.selection.image_based import ImageBased
from curation.selection.semantic_duplicates import SemanticDuplicates, keep_distinct
from curation.selection.uids import Uids
from tests.curation import by_hand
from tests.curation.selecting import select
from tests.curation.test_selection import keeps, write_parts

ROWS, WIDTH, EPS = 10_000, 32, 0.05
Mode = Literal["semdedup", "greedy"]


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def as_table(points: np.ndarray, uids: list[str]) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(points.astype(np.float16).ravel()), points.shape[1])
    error = pa.array([None if i % 50 else "image_decode" for i in range(len(uids))], pa.string())
    return pa.table({"uid": uids, "error": error, "embedding": vectors})


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Six clouds of pictures with near copies in them, chains among these, and exact copies."""
    rng = np.random.default_rng(0)
    points = unit(rng.normal(size=(6, WIDTH)))[rng.integers(0, 6, ROWS)] + 0.12 * rng.normal(size=(ROWS, WIDTH))
    for i in range(1, ROWS, 2):
        of = rng.integers(max(0, i - 30), i)
        points[i] = points[of] + (0.0 if i % 9 == 0 else 0.04) * rng.normal(size=WIDTH)
    return as_table(unit(points), [f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[Part]:
    return write_parts(tmp_path_factory.mktemp("parts"), table, [1, 1000, 1100, 4500])


def selector_of(mode: Mode) -> SemanticDuplicates:
    return SemanticDuplicates(column="embedding", clusters=3, eps=EPS, mode=mode, sample=2000, seed=3)


def clusters_of(table: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each cluster: (rows in the order of comparison, their cosines to each other in float64)."""
    rows, points, uids = by_hand.sound(table)
    centroids = by_hand.centroids(points, uids, clusters=3, sample=2000, seed=3)
    points = unit(points)
    nearest = (points @ centroids.T).argmax(axis=1)
    likeness = (points * centroids[nearest]).sum(axis=1)
    out = []
    for cluster in range(len(centroids)):
        order = sorted(np.flatnonzero(nearest == cluster), key=lambda i: (likeness[i], uids[i]))
        out.append((rows[order], points[order] @ points[order].T))
    return out


@pytest.fixture(params=[8192, 300])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile that is used, and one so small that a cluster takes several."""
    monkeypatch.setattr(semantic_duplicates, "TILE", request.param)


@pytest.mark.usefixtures("tile")
def test_semdedup_against_all_pairs(table: pa.Table, parts: list[Part]) -> None:
    kept = keeps(selector_of("semdedup"), parts)
    sizes, total = [], 0
    for rows, cosines in clusters_of(table):
        expected = np.triu(cosines, 1).max(axis=0) <= 1 - EPS
        np.testing.assert_array_equal(kept[rows], expected)
        sizes.append(len(rows))
        total += int(expected.sum())
    assert min(sizes) > 1024 and 0.1 * ROWS < total < 0.9 * ROWS  # several blocks, and both verdicts


@pytest.mark.usefixtures("tile")
def test_greedy_keeps_a_neighbour_of_each_dropped(table: pa.Table, parts: list[Part]) -> None:
    kept = keeps(selector_of("greedy"), parts)
    for rows, cosines in clusters_of(table):
        stay = kept[rows]
        assert (cosines[~stay][:, stay].max(axis=1) > 1 - EPS).all()
        among = cosines[np.ix_(stay, stay)] - 2 * np.eye(stay.sum())
        assert among.max() <= 1 - EPS
        expected: list[int] = []
        for i in range(len(rows)):
            if not (cosines[i, expected] > 1 - EPS).any():
                expected.append(i)
        np.testing.assert_array_equal(np.flatnonzero(stay), expected)
    assert kept.sum() > keeps(selector_of("semdedup"), parts).sum()


@pytest.mark.parametrize("mode", ["semdedup", "greedy"])
def test_one_cluster_against_numpy_alone(mode: Mode, table: pa.Table, tmp_path: Path) -> None:
    """Its centroid is the mean direction of its rows, so that the oracle needs no k-means."""
    some = table.slice(0, 4_000)
    selector = SemanticDuplicates(column="embedding", clusters=1, eps=EPS, mode=mode)
    kept = keeps(selector, write_parts(tmp_path, some, [1, 1700]))
    rows, points, uids = by_hand.sound(some)
    centroid = unit(points.mean(axis=0, keepdims=True))[0]
    points = unit(points)
    likeness = (points * centroid).sum(axis=1)
    order = sorted(range(len(rows)), key=lambda i: (likeness[i], uids[i]))
    close = points[order] @ points[order].T > 1 - EPS
    expected: list[int] = []
    for i in range(len(order)):
        earlier = list(range(i)) if mode == "semdedup" else expected
        if not close[i, earlier].any():
            expected.append(i)
    assert set(rows[kept[rows]]) == {rows[order[i]] for i in expected}
    assert 400 < len(expected) < 3_600


@pytest.mark.parametrize(("mode", "expected"), [("semdedup", [0]), ("greedy", [0, 2, 4])])
def test_a_chain_of_six(mode: Mode, expected: list[int], tmp_path: Path) -> None:
    """Each is close to the next alone; a crowd beyond the last draws the centroid there, so the first is hardest."""
    step = 1.2 * np.arccos(1 - EPS) / 2
    crowd = np.pi / 2
    angles = np.concatenate([[crowd], np.arange(6) * step, np.full(60, crowd)])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert points[1] @ points[2] > 1 - EPS > points[1] @ points[3]
    table = as_table(points, [f"{i:04}" for i in range(67)])
    selector = SemanticDuplicates(column="embedding", clusters=1, eps=EPS, mode=mode)
    kept = np.flatnonzero(keeps(selector, write_parts(tmp_path, table, [3]))[1:7])
    assert kept.tolist() == expected


@pytest.mark.parametrize("mode", ["semdedup", "greedy"])
def test_the_choice_depends_on_neither_parts_nor_order(
    mode: Mode, table: pa.Table, parts: list[Part], tmp_path: Path
) -> None:
    kept = keeps(selector_of(mode), parts)
    np.testing.assert_array_equal(keeps(selector_of(mode), write_parts(tmp_path, table, [2000, 2001, 5000])), kept)
    shuffled = np.random.default_rng(1).permutation(ROWS)
    other = write_parts(tmp_path, table.take(pa.array(shuffled)), [77])
    np.testing.assert_array_equal(keeps(selector_of(mode), other), kept[shuffled])


def test_neither_rows_nor_samples_reach_the_process_that_decides(
    table: pa.Table, parts: list[Part], tmp_path: Path
) -> None:
    """By what goes to and comes from the workers: the sample is 320 KB here, the list 80 KB, half of the pool."""
    reference_of(tmp_path, table)
    pairs = [(int(u[:16], 16), int(u[16:], 16)) for u in table["uid"].to_pylist()[: ROWS // 2]]
    np.save(tmp_path / "subset.npy", np.sort(np.array(pairs, "u8,u8")))
    selectors = {
        "uids": Uids(file=str(tmp_path / "subset.npy")),
        "balance": ClusterBalance(column="embedding", clusters=6, max_share=0.15, sample=5_000),
        "image_based": ImageBased(
            column="embedding", clusters=100, reference=str(tmp_path / "reference.npy"), sample=5_000
        ),
        "semantic": SemanticDuplicates(column="embedding", clusters=3, eps=EPS, sample=5_000),
    }
    sent: list[int] = []

    def watched(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            result = pickle.loads(pickle.dumps(function))(item)
            sent.extend(len(pickle.dumps(one)) for one in (function, item, result))
            yield result

    run = engine.run(selectors, engine.partitions(parts, 2_000), tmp_path / "run", watched)
    assert run.stages[0]["dropped"] > 4_000 and run.stages[-1]["dropped"] and run.stages[-1]["out"] > 50
    assert max(sent) < 10_000


@pytest.mark.parametrize("kind", ["semantic", "balance", "image_based"])
def test_a_recipe_for_a_large_pool_says_so_on_a_small_one(
    kind: str, table: pa.Table, parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference_of(tmp_path, table)

    def stage(rows: int, **sizes: int) -> dict[str, Any]:
        made = {
            "semantic": lambda: SemanticDuplicates(column="embedding", eps=EPS, **sizes),
            "balance": lambda: ClusterBalance(column="embedding", cap=3, **sizes),
            "image_based": lambda: ImageBased(column="embedding", reference=str(tmp_path / "reference.npy"), **sizes),
        }[kind]()
        return select({"it": made}, write_parts(tmp_path, table.slice(0, rows), [])).stages[0]

    text = (
        "clusters 50,000 for 1,960 samples: with fewer than 10 in each, alike ones fall apart; "
        "set clusters to one for every 1,000 or so, here 1"
    )
    assert stage(2_000, clusters=50_000)["warnings"] == [text]
    assert capsys.readouterr().err == f"selectors.it: {text}\n"
    text = "sample 90 for 10 clusters: fewer than 10 train each; raise sample to 100 or more"
    assert stage(2_000, clusters=10, sample=90)["warnings"] == [text]
    assert "warnings" not in stage(2_000, clusters=10, sample=100)


def test_nothing_left_and_what_the_manifest_says(table: pa.Table, tmp_path: Path, parts: list[Part]) -> None:
    nothing = write_parts(tmp_path, table.slice(0, 1), [])
    assert keeps(selector_of("greedy"), nothing).all()
    stage = select({"it": selector_of("greedy")}, parts).stages[0]
    assert stage["filled_clusters"] == 3
    assert stage["largest_cluster"] == max(len(rows) for rows, _ in clusters_of(table))


@pytest.mark.parametrize("mode", ["semdedup", "greedy"])
def test_memory_is_far_below_all_pairs(mode: Mode) -> None:
    points = unit(np.random.default_rng(0).normal(size=(8192, 64))).astype(np.float32)
    tracemalloc.start()
    keep = keep_distinct(points, 0.3, mode)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert keep.mean() > 0.9  # little is dropped, so nearly every tile was met
    assert peak < 50 * 2**20  # all pairs in float32: 256 MiB


@pytest.fixture(scope="module")
def centroids() -> np.ndarray:
    """Of mixed norms, so that the largest dot product and the smallest distance often differ: [40, D]."""
    rng = np.random.default_rng(7)
    return (unit(rng.normal(size=(40, WIDTH))) * rng.uniform(0.4, 1.0, (40, 1))).astype(np.float32)


def plain_nearest(points: np.ndarray, centroids: np.ndarray, assignment: str) -> np.ndarray:
    points = points.astype(np.float64)
    if assignment == "ip-raw":
        return (points @ centroids.T).argmax(axis=1)
    return ((points[:, None] - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)


def reference_of(folder: Path, table: pa.Table) -> np.ndarray:
    rows = clustering.embeddings(table, "embedding")[5:600:40]
    np.save(folder / "reference.npy", rows)
    return rows


@pytest.mark.parametrize("assignment", ["ip-raw", "l2"])
@pytest.mark.parametrize("form", ["npy", "torch 2", "torch 4"])
def test_image_based_against_argmax(
    assignment: Literal["ip-raw", "l2"],
    form: str,
    table: pa.Table,
    parts: list[Part],
    centroids: np.ndarray,
    tmp_path: Path,
) -> None:
    reference = reference_of(tmp_path, table)
    file = tmp_path / ("c.npy" if form == "npy" else "c.pt")
    if form == "npy":
        np.save(file, centroids)
    else:  # DataComp writes protocol 4
        torch.save(centroids, file, pickle_protocol=int(form[-1]))
    selector = ImageBased(
        column="embedding", centroids=str(file), reference=str(tmp_path / "reference.npy"), assignment=assignment
    )
    points, valid = clustering.embeddings(table, "embedding"), table["error"].is_null().to_numpy()
    touched = set(plain_nearest(reference, centroids, assignment).tolist())
    expected = np.isin(plain_nearest(points, centroids, assignment), list(touched))
    np.testing.assert_array_equal(keeps(selector, parts)[valid], expected[valid])
    assert 0 < expected.sum() < ROWS
    stage = select({"it": selector}, parts).stages[0]
    assert (stage["centroids"], stage["centroids_touched"]) == (40, len(touched))
    disagree = plain_nearest(points, centroids, "ip-raw") != plain_nearest(points, centroids, "l2")
    assert disagree.mean() > 0.05


def test_image_based_trains_and_reads_a_measured_reference(table: pa.Table, parts: list[Part], tmp_path: Path) -> None:
    reference_of(tmp_path, table)
    pq.write_table(table.slice(5, 595), tmp_path / "p.parquet")
    write_manifest(tmp_path / "measure.manifest.json", {"signal_set": str(tmp_path), "parts": ["p.parquet"]})
    by_folder = ImageBased(column="embedding", clusters=300, reference=str(tmp_path), sample=3000)
    kept = keeps(by_folder, parts)
    assert kept[5:600].all() and not kept.all()  # the reference is of the pool, so it is in its own clusters
    np.testing.assert_array_equal(keeps(by_folder, write_parts(tmp_path, table, [3000])), kept)
    by_array = ImageBased(column="embedding", clusters=300, reference=str(tmp_path / "reference.npy"), sample=3000)
    fewer = keeps(by_array, parts)
    assert fewer.sum() < kept.sum() and kept[fewer].all()
    assert keeps(by_folder, write_parts(tmp_path, table.slice(0, 1), [])).all()  # an error row alone: nothing to train

    schema = table.schema
    tagged = table.cast(schema.set(2, schema.field(2).with_metadata({"identity": "other model"})))
    with pytest.raises(UserError, match="not measured by the same model"):
        keeps(by_folder, write_parts(tmp_path, tagged, [5]))


def test_image_based_refuses_by_name(table: pa.Table, parts: list[Part], centroids: np.ndarray, tmp_path: Path) -> None:
    reference_of(tmp_path, table)
    good = {"reference": str(tmp_path / "reference.npy"), "centroids": str(tmp_path / "c.npy")}
    np.save(tmp_path / "c.npy", centroids)
    before = ImageBased(column="embedding", **good).content()
    np.save(tmp_path / "c.npy", centroids[1:])
    assert ImageBased(column="embedding", **good).content() != before
    np.save(tmp_path / "narrow.npy", centroids[:, 1:])
    np.save(tmp_path / "flat.npy", centroids[0])
    holed = np.load(tmp_path / "reference.npy")
    holed[1, 2] = np.nan
    np.save(tmp_path / "holed.npy", holed)
    (tmp_path / "text.npy").write_text("no array")
    torch.save({"model": torch.zeros(3)}, tmp_path / "model.pt")
    for change, message in (
        ({"centroids": str(tmp_path / "none.npy")}, r"centroids .*none\.npy: no such file; name an array"),
        ({"centroids": str(tmp_path / "none.pt")}, r"centroids .*none\.pt: no such file; name an array"),
        ({"reference": str(tmp_path / "none.npy")}, r"reference .*none\.npy: no such file; name an array"),
        ({"reference": str(tmp_path / "none")}, r"reference .*none: no finished measure there; run"),
        ({"centroids": str(tmp_path / "flat.npy")}, r"centroids .*flat\.npy: not a matrix of floats"),
        ({"centroids": str(tmp_path / "text.npy")}, r"centroids .*text\.npy: cannot be read as \.npy"),
        ({"centroids": str(tmp_path / "model.pt")}, r"centroids .*model\.pt: neither \.npy nor a torch-pickled array"),
        ({"centroids": str(tmp_path / "narrow.npy")}, "width 32, but the centroids have 31"),
        ({"reference": str(tmp_path / "holed.npy")}, r"reference .*holed\.npy: 1 embeddings have no nearest centroid"),
    ):
        selector = ImageBased(column="embedding", **{**good, **change})
        with pytest.raises(UserError, match=message):
            keeps(selector, parts)
        if "no such file" in message:
            with pytest.raises(UserError, match=message):
                selector.content()
    with pytest.raises(UserError, match="column uid: holds no embeddings"):
        keeps(ImageBased(column="uid", **good), parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "semantic_duplicates", "clusters": 3, "eps": 1.5}, r"eps 1\.5 is not in \(0, 1\)"),
        ({"kind": "semantic_duplicates", "clusters": 0, "eps": 0.1}, "clusters 0 is not at least 1"),
        ({"kind": "semantic_duplicates", "clusters": 3, "eps": 0.1, "mode": "all"}, r"selectors\.x"),
        ({"kind": "image_based", "reference": "r.npy"}, "exactly one of centroids and clusters"),
        ({"kind": "image_based", "reference": "r.npy", "centroids": "c.npy", "clusters": 3}, "exactly one of"),
        ({"kind": "image_based", "reference": "r.npy", "clusters": 0}, "clusters 0 is not at least 1"),
        ({"kind": "image_based", "reference": "r.npy", "clusters": 3, "assignment": "ip"}, r"selectors\.x"),
    ],
)
def test_recipes_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"selectors": {"x": settings}})
