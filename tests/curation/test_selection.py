"""Selectors against brute force and published formulas, over parts of uneven size."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.manifest import write_manifest
from curation.selection import near_duplicates
from curation.selection.caption_rules import CaptionRules
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.engine import Part
from curation.selection.exact_duplicates import ExactDuplicates
from curation.selection.fraction import Fraction
from curation.selection.interface import Selector
from curation.selection.language import LanguageIs
from curation.selection.near_duplicates import NearDuplicates
from curation.selection.reference_quantile import ReferenceQuantile
from curation.selection.threshold import Threshold
from curation.selection.values import Values
from tests.curation import by_hand
from tests.curation.selecting import select

ROWS = 10_000


def write_parts(folder: Path, table: pa.Table, cuts: list[int]) -> list[Part]:
    parts = []
    for n, (start, end) in enumerate(zip([0, *cuts], [*cuts, table.num_rows], strict=True)):
        path = folder / f"{len(cuts)}-{n}.parquet"
        pq.write_table(table.slice(start, end - start), path)
        parts.append(Part(path=path, first=start, rows=end - start))
    return parts


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    score = rng.normal(0.25, 0.1, ROWS).round(3).astype(np.float32)  # rounded, so that there are ties
    score[5] = np.nan
    centres = rng.normal(size=(8, 16))
    points = centres[rng.integers(0, 8, ROWS) ** 2 % 8] + 0.2 * rng.normal(size=(ROWS, 16))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
    hashes = rng.integers(0, 2**63, ROWS, dtype=np.uint64)
    for i in range(1, ROWS, 3):  # slow chains: each a few flipped bits away from an earlier one
        flips = rng.choice(64, rng.integers(0, 5), replace=False)
        hashes[i] = hashes[rng.integers(max(0, i - 50), i)] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64)
        )
    error = np.where(rng.random(ROWS) < 0.02, "image_decode", None)
    valid = error == None  # noqa: E711
    return pa.table(
        {
            "uid": [f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)],
            "error": pa.array(error.tolist(), pa.string()),
            "score": pa.array(score, mask=~valid),
            "width": pa.array(rng.integers(10, 900, ROWS), pa.int32(), mask=~valid),
            "digest": pa.array([bytes([d % 256, d // 256]) for d in rng.integers(0, 6000, ROWS)], mask=~valid),
            "phash": pa.array(hashes, pa.uint64(), mask=~valid),
            "language": pa.array(rng.choice(["en", "de", ""], ROWS).tolist(), pa.string(), mask=~valid),
            "language_probability": pa.array(rng.random(ROWS).astype(np.float32), mask=~valid),
            "embedding": pa.array(points.tolist(), pa.list_(pa.float16(), 16), mask=~valid),
        }
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[Part]:
    return write_parts(tmp_path_factory.mktemp("parts"), table, [1, 2500, 2600, 7000])


def dropped(selectors: Mapping[str, Selector], parts: list[Part]) -> np.ndarray:
    """bool [rows, selectors]; rows with an error are False everywhere."""
    return select(selectors, parts).failed


def keeps(selector: Selector, parts: list[Part]) -> np.ndarray:
    return ~dropped({"it": selector}, parts)[:, 0]


def valid_of(table: pa.Table) -> np.ndarray:
    return table["error"].is_null().to_numpy()


def test_threshold(table: pa.Table, parts: list[Part]) -> None:
    valid, score = valid_of(table), table["score"].to_numpy()
    width = np.array([w or 0 for w in table["width"].to_pylist()])
    with np.errstate(invalid="ignore"):
        expected = score >= np.float32(0.3)
    np.testing.assert_array_equal(keeps(Threshold(column="score", min=0.3), parts)[valid], expected[valid])
    np.testing.assert_array_equal(
        keeps(Threshold(column="width", min=100, max=500.5), parts)[valid], ((width >= 100) & (width <= 500.5))[valid]
    )
    assert not keeps(Threshold(column="score", min=-9), parts)[5]
    assert keeps(Threshold(column="score", min=-9, missing="keep"), parts)[5]


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 1.0])
def test_fraction_as_datacomp_counts(table: pa.Table, parts: list[Part], fraction: float) -> None:
    valid = valid_of(table)
    scores = np.nan_to_num(table["score"].to_numpy()[valid], nan=-np.inf)
    n = int(len(scores) * fraction)
    threshold = np.sort(scores)[::-1][min(n, len(scores) - 1)]
    expected = (scores >= threshold) & np.isfinite(scores)
    np.testing.assert_array_equal(keeps(Fraction(column="score", fraction=fraction), parts)[valid], expected)


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.7])
def test_exact_fraction_breaks_ties_by_uid(table: pa.Table, parts: list[Part], fraction: float) -> None:
    valid = np.flatnonzero(valid_of(table))
    scores, uids = table["score"].to_numpy(), table["uid"].to_pylist()
    ranked = sorted(valid, key=lambda i: (np.isnan(scores[i]), -scores[i], uids[i]))
    expected = set(ranked[: int(len(valid) * fraction)])
    kept = keeps(Fraction(column="score", fraction=fraction, mode="exact"), parts)
    assert set(valid[kept[valid]]) == expected


def test_language(table: pa.Table, parts: list[Part]) -> None:
    kept = keeps(LanguageIs(languages=["en", "fr"], min_probability=0.4), parts)
    for row, keep in zip(table.to_pylist(), kept, strict=True):
        if row["error"] is None:
            assert keep == (row["language"] == "en" and row["language_probability"] >= np.float32(0.4))


def test_exact_duplicates_keep_the_first_survivor(table: pa.Table, parts: list[Part]) -> None:
    selectors = {"wide": Threshold(column="width", min=400), "copies": ExactDuplicates(by=("digest",))}
    failed = dropped(selectors, parts)
    seen = set()
    for i, row in enumerate(table.to_pylist()):
        if row["error"] is None and row["width"] >= 400:
            assert failed[i, 1] == (row["digest"] in seen)
            seen.add(row["digest"])
        else:
            assert not failed[i, 1]


def test_a_missing_value_is_a_copy_of_nothing(tmp_path: Path) -> None:
    table = pa.table(
        {
            "url": pa.array(["a", None, "a", None, "b", None], pa.string()),
            "caption": ["x", "y", "x", "y", "x", "y"],
            "error": pa.nulls(6, pa.string()),
        }
    )
    parts = write_parts(tmp_path, table, [1, 4])
    assert keeps(ExactDuplicates(by=("url",)), parts).tolist() == [True, True, False, True, True, True]
    assert keeps(ExactDuplicates(by=("caption", "url")), parts).tolist() == [True, True, False, True, True, True]
    assert keeps(ExactDuplicates(by=("caption",)), parts).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_near_duplicates_against_all_pairs(
    table: pa.Table, parts: list[Part], distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = np.flatnonzero(valid_of(table))
    hashes = np.array([h or 0 for h in table["phash"].to_pylist()], np.uint64)
    expected: list[int] = []
    for i in valid:  # greedy, against everything kept so far
        if not expected or (np.bitwise_count(hashes[expected] ^ hashes[i]) > distance).all():
            expected.append(i)
    for pairs in (near_duplicates.PAIRS, 50):  # decided at once
        monkeypatch.setattr(near_duplicates, "PAIRS", pairs)
        kept = keeps(NearDuplicates(distance=distance), parts)
        np.testing.assert_array_equal(valid[kept[valid]], expected)
    assert len(expected) < len(valid)


def test_cluster_balance_caps_each_cluster(table: pa.Table, parts: list[Part], tmp_path: Path) -> None:
    selector = ClusterBalance(column="embedding", clusters=8, cap=1000, sample=4000, seed=5)
    selection = select({"balance": selector}, parts)
    failed = selection.failed[:, 0]
    clusters = selection.stages[0]["clusters"]
    valid = valid_of(table)
    assert sum(clusters["before"]) == valid.sum() and max(clusters["before"]) > 1000 > min(clusters["before"])
    assert sum(clusters["after"]) == valid.sum() - failed.sum()
    assert clusters["after"] == [min(n, 1000) for n in clusters["before"]]
    # FAISS by hand, and in each cluster the thousand rows whose hash is lowest.
    rows, points, uids = by_hand.sound(table)
    centroids = by_hand.centroids(points, uids, clusters=8, sample=4000, seed=5)
    nearest = (points @ centroids.T).argmax(axis=1)
    kept: list[int] = []
    for cluster in range(8):
        members = np.flatnonzero(nearest == cluster).tolist()
        kept += sorted(members, key=lambda i: by_hand.hash64("5/cluster choice", uids[i]))[:1000]
    assert clusters["before"] == np.bincount(nearest, minlength=8).tolist()
    np.testing.assert_array_equal(np.flatnonzero(valid & ~failed), np.sort(rows[kept]))
    # The same rows cut into other parts give the same choice.
    other = write_parts(tmp_path, table, [3000, 9999])
    np.testing.assert_array_equal(keeps(selector, other), ~failed)


def test_cluster_caps_by_quantile_and_share(parts: list[Part]) -> None:
    for settings, expected in (
        ({"cap_quantile": 0.5}, lambda sizes: int(np.ceil(np.quantile([s for s in sizes if s], 0.5)))),
        ({"max_share": 0.05}, lambda sizes: int(np.ceil(0.05 * sum(sizes)))),
    ):
        selector = ClusterBalance(column="embedding", clusters=8, **settings)
        clusters = select({"b": selector}, parts).stages[0]["clusters"]
        assert clusters["cap"] == expected(clusters["before"])


def test_reference_quantile(table: pa.Table, tmp_path: Path) -> None:
    def tagged(identity: str, values: pa.Table) -> pa.Table:
        schema = values.schema
        place = schema.get_field_index("score")
        return values.cast(schema.set(place, schema.field(place).with_metadata({"identity": identity})))

    trusted = tmp_path / "trusted"
    trusted.mkdir()
    pq.write_table(tagged("A", table.slice(0, 500)), trusted / "p.parquet")
    write_manifest(trusted / "measure.manifest.json", {"signal_set": str(trusted), "parts": ["p.parquet"]})
    parts = write_parts(tmp_path, tagged("A", table), [4000])
    scores = table["score"].to_numpy()
    reference = np.sort(scores[:500][~np.isnan(scores[:500])])
    threshold = reference[int(np.floor(0.1 * (len(reference) - 1)))]
    kept = keeps(ReferenceQuantile(column="score", reference=str(trusted), quantile=0.1), parts)
    valid = valid_of(table)
    np.testing.assert_array_equal(kept[valid], np.nan_to_num(scores, nan=-9)[valid] >= threshold)

    other = write_parts(tmp_path, tagged("B", table), [])
    with pytest.raises(UserError, match="not measured by the same model"):
        keeps(ReferenceQuantile(column="score", reference=str(trusted), quantile=0.1), other)
    with pytest.raises(UserError, match="no finished measure"):
        keeps(ReferenceQuantile(column="score", reference=str(tmp_path / "none"), quantile=0.1), other)


BOILERPLATE = [
    *("IMG_2041.JPG", "DSC00012", "untitled", "Untitled 3", "image", "Screenshot 2021-03-04 at 10.11.12", "1024x768"),
    *("click to enlarge", "Click here to view larger image", "Image may contain: 2 people", "stock photo of a dog"),
    *("my-holiday-photo-3.jpg", "8f14e45fceea167a5a36dedd4bea2543", "https://example.org/x", "2019-03-02", "$ 12.99"),
    *("No description available", "royalty free vector of a tree", "red_shoe_large", "<img src=x>", "Red dress | Shop"),
    *("photo courtesy of the museum", "", "   ", "Add to cart", "© 2014 John Smith", "12 345"),
]
SENTENCES = [
    *("a stock car races past the stands", "a dog", "two children click their heels", "a red car", "7 birds fly"),
    *("a man presses a button on a box", "a boy does press ups on the floor", "an image of a lake at dusk"),
    *("the photo shows 3 cats on a mat", "A well-known man shops at a market now", "a woman downloads music"),
    *("self-portrait of the artist", "a logo painted on the side of a van"),
]


def test_caption_rules_on_captions_by_hand() -> None:
    rules = CaptionRules()
    kept = rules.apply(pa.table({"caption": [*BOILERPLATE, *SENTENCES]}), None)
    wrong = [c for c, keep in zip(BOILERPLATE, kept, strict=False) if keep]
    wrong += [c for c, keep in zip(SENTENCES, kept[len(BOILERPLATE) :], strict=True) if not keep]
    assert not wrong
    # Each pattern by itself: with its own flags, and groups that are counted from its own first one.
    own = CaptionRules(patterns=["(?i)FOR SALE", r"(\w)\1\1", "(?P<same>very) (?P=same)", "(?P<same>x) y"])
    captions = ["a house for sale", "it is sooo green", "a very very old tree", "an x y plot", "a house by a tree"]
    assert own.apply(pa.table({"caption": captions}), None).tolist() == [False] * 4 + [True]
    words = CaptionRules(min_words=3, builtin=False, patterns=["forbidden"])
    captions = pa.table({"caption": ["two words", "now three words", "a FORBIDDEN thing", "click to enlarge"]})
    assert words.apply(captions, None).tolist() == [False, True, False, True]


def test_case_is_ignored_in_every_alphabet() -> None:
    texts = ["ΟΔΟΣ", "οδος", "STRASSE", "Straße", "İ", "ȺȾ", "ȺȾ".lower()]
    for text in texts:
        assert Values(column="t", allow=[text], ignore_case=True).apply(
            pa.table({"t": [text, None]}), None
        ).tolist() == [
            True,
            False,
        ], text
    table = pa.table({"t": texts})
    assert Values(column="t", deny=["Οδοσ"], ignore_case=True).apply(table, None).tolist() == [False] + [True] * 6


def test_whole_numbers_beyond_float64_beside_missing_ones() -> None:
    table = pa.table({"n": pa.array([2**53 + 1, None, 5, -(2**62) - 1], pa.int64())})
    assert Threshold(column="n", min=5).apply(table, None).tolist() == [True, False, True, False]


def test_stages_are_counted_in_order(table: pa.Table, parts: list[Part]) -> None:
    selectors = {"a": Threshold(column="score", min=0.3), "b": Threshold(column="width", min=500)}
    selection = select(selectors, parts)
    failed, valid = selection.failed, valid_of(table)
    a, b = selection.stages
    assert (a["in"], a["dropped"], a["would_drop"]) == (valid.sum(), failed[:, 0].sum(), failed[:, 0].sum())
    assert (b["in"], b["dropped"]) == (a["out"], (failed[:, 1] & ~failed[:, 0]).sum())
    assert b["would_drop"] == failed[:, 1].sum() > b["dropped"]


def test_a_selector_that_keeps_nothing_says_so(
    table: pa.Table, parts: list[Part], capsys: pytest.CaptureFixture[str]
) -> None:
    selectors = {"some": Threshold(column="score", min=0.1), "english": LanguageIs(languages=["EN"])}
    some, english, after = select({**selectors, "after": Threshold(column="width", min=1)}, parts).stages
    assert english["out"] == 0 and "warnings" not in some and "warnings" not in after
    assert english["warnings"] == [f"keeps none of the {english['in']:,} samples that are left; check its settings"]
    assert capsys.readouterr().err.splitlines() == [f"selectors.english: {english['warnings'][0]}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selectors": {"x": {"kind": "thresold"}}}, r"selectors\.x\.kind: 'thresold' is unknown"),
        ({"signals": {"x": {"kind": "sound"}}}, r"signals\.x\.kind: 'sound' is unknown"),
        ({"selectors": {"x": {"kind": "threshold", "column": "caption_chars", "mim": 3}}}, r"selectors\.x\.mim"),
        ({"selectors": {"x": {"kind": "threshold", "column": "nothing", "min": 3}}}, "nothing is not measured"),
        ({"selectors": {"x": {"kind": "threshold", "column": "uid"}}}, "neither min nor max"),
        ({"selectors": {"x": {"kind": "fraction", "column": "uid", "fraction": "half"}}}, r"selectors\.x"),
        ({"selectors": {"x": {"kind": "cluster_balance", "clusters": 3}}}, "exactly one of cap"),
        ({"sed": 3}, "sed: unknown setting"),
        ({"seed": "three"}, "recipe"),
        ({"seed": None}, r"recipe\.seed: null"),
        ({"max_error_rate": float("nan")}, "max_error_rate"),
        ({"signals": {"x": {"kind": ["text"]}}}, r"signals\.x\.kind: \['text'\] is unknown"),
        ({"selectors": {"x": {"kind": "exact_duplicates", "by": None}}}, r"selectors\.x\.by: null"),
        ({"selectors": {"x": {"kind": "language", "languages": ["en"], 7: 1, "zz": 2}}}, r"selectors\.x\.7: unknown"),
        ({7: 1, "zz": 2}, r"recipe\.7: unknown"),
        ({"selectors": {"x": {"kind": "threshold", "column": "uid", "min": 3}}}, r"x\.column: uid holds no numbers"),
        ({"selectors": {"x": {"kind": "fraction", "column": "url", "fraction": 0.5}}}, "url holds no numbers"),
        ({"shard_samples": 0}, "shard_samples"),
        *(
            ({"selectors": {"x": settings}}, message)
            for settings, message in (
                (
                    {"kind": "threshold", "column": "caption_words", "min": 9, "max": 3},
                    r"between min 9(\.0)? and max 3",
                ),
                ({"kind": "threshold", "column": "caption_words", "min": float("nan")}, "between min nan"),
                ({"kind": "cluster_balance", "clusters": 3, "cap": 0}, "cap 0 is not at least 1"),
                ({"kind": "cluster_balance", "clusters": 3, "cap_quantile": 90.0}, r"cap_quantile 90\.0 is not in"),
                ({"kind": "cluster_balance", "clusters": 3, "max_share": 0.0}, r"max_share 0\.0 is not in"),
                ({"kind": "cluster_balance", "clusters": 3, "cap": 1, "column": "url"}, "column: url holds no embed"),
                ({"kind": "near_duplicates", "column": "caption_words"}, "column: caption_words holds no hashes"),
                ({"kind": "exact_duplicates", "by": []}, "by is empty"),
                ({"kind": "exact_duplicates", "by": ["url", "sizes"]}, r"x\.by\.sizes: sizes holds lists"),
                ({"kind": "values", "column": "caption_words", "allow": [2**40]}, "no int32 is 1099511627776"),
                (
                    {"kind": "score_fusion", "weights": {"caption_words": 0.5}, "minimum": 0.6},
                    r"no sum reaches .* 0\.6",
                ),
            )
        ),
    ],
)
def test_recipes_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"signals": {"text": {"kind": "text"}}, **change})


def test_a_recipe_that_is_no_text_and_an_override_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("seed: 0  # für alle".encode("latin-1"))
    with pytest.raises(UserError, match=r"--config .*latin\.yaml"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "fine.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match=r"--seed \[a: not YAML"):
        load_config(tmp_path / "fine.yaml", ["--seed", "[a"])
