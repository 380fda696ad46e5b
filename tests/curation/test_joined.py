"""any_of and all_of against NumPy's own "or" and "and" of what each selector keeps alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from curation.config import parse_config
from curation.errors import UserError
from curation.selection.engine import Part
from curation.selection.fraction import Fraction
from curation.selection.fusion import ScoreFusion
from curation.selection.image_based import ImageBased
from curation.selection.interface import Selector
from curation.selection.joined import AllOf, AnyOf
from curation.selection.language import LanguageIs
from curation.selection.threshold import Threshold
from curation.selection.uids import Uids
from tests.curation.selecting import select
from tests.curation.test_selection import valid_of, write_parts

ROWS, WIDTH = 10_000, 8


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    valid = rng.random(ROWS) > 0.03
    points = rng.normal(size=(ROWS, WIDTH))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
    return pa.table(
        {
            "uid": [f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)],
            "error": pa.array(np.where(valid, None, "image_decode").tolist(), pa.string()),
            "language": pa.array(rng.choice(["en", "de"], ROWS).tolist(), mask=~valid),
            "language_probability": pa.array(rng.random(ROWS).astype(np.float32), mask=~valid),
            "score": pa.array(rng.normal(0.2, 0.1, ROWS).round(2).astype(np.float32), mask=~valid),
            "words": pa.array(rng.integers(0, 30, ROWS), pa.int32(), mask=~valid),
            "embedding": pa.array(list(points), pa.list_(pa.float16(), WIDTH), mask=~valid),
        }
    )


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[list[Part]]:
    """The same rows in parts of two cuts; the second has a part of one row and an empty one."""
    folder = tmp_path_factory.mktemp("parts")
    return [write_parts(folder, table, [1000, 7000]), write_parts(folder, table, [1, 1, 19, 650, 9_990])]


def often(selector: Selector, cuts: list[list[Part]]) -> np.ndarray:
    """How often each row is kept, int64 [rows], the same for every cut; rows with an error are kept."""
    selected = [select({"it": selector}, parts) for parts in cuts]
    first, *others = [np.where(one.failed[:, 0], 0, one.copies) for one in selected]
    for other in others:
        np.testing.assert_array_equal(other, first)
    return first


@pytest.fixture(scope="module")
def inner(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Selector]:
    """Of every kind: by row, by a fraction of the pool, with repeats, by centroids, and a union."""
    folder, rng, uids = tmp_path_factory.mktemp("files"), np.random.default_rng(1), table["uid"].to_pylist()
    (folder / "uids.txt").write_text("\n".join([*uids[::50], *uids[::100], *uids[::100]]))
    np.save(folder / "centroids.npy", rng.normal(size=(20, WIDTH)).astype(np.float32))
    np.save(folder / "reference.npy", rng.normal(size=(3, WIDTH)).astype(np.float32))
    files = {name: str(folder / f"{name}.npy") for name in ("centroids", "reference")}
    return {
        "language": LanguageIs(languages=["de"], min_probability=0.9),
        "uids": Uids(file=str(folder / "uids.txt")),
        "best": Fraction(column="score", fraction=0.1, mode="exact"),
        "fused": ScoreFusion(weights={"score": 1.0, "words": 1.0}, fraction=0.1),
        "near": ImageBased(column="embedding", **files),
        "inside": AnyOf(selectors={"long": Threshold(column="words", min=28)}),
    }


def test_a_union_and_an_intersection_of_all_kinds(
    table: pa.Table, cuts: list[list[Part]], inner: dict[str, Selector]
) -> None:
    alone, valid = np.array([often(selector, cuts) for selector in inner.values()]), valid_of(table)
    assert set(alone[1]) == {0, 1, 3}
    union = often(AnyOf(selectors=inner), cuts)
    np.testing.assert_array_equal(union[valid], alone.max(axis=0)[valid])
    assert alone.astype(bool).sum(axis=1).max() < union.astype(bool).sum() < ROWS
    both = {name: inner[name] for name in ("uids", "near")}
    product = often(AllOf(selectors=both), cuts)
    np.testing.assert_array_equal(product[valid], (alone[1] * alone[4])[valid])
    assert set(product[valid]) == {0, 1, 3}
    plain = {name: inner[name] for name in ("best", "near")}
    mixed = AnyOf(selectors={"language": inner["language"], "both": AllOf(selectors=plain)})
    expected = alone[0].astype(bool) | (alone[2] & alone[4]).astype(bool)
    np.testing.assert_array_equal(often(mixed, cuts)[valid], expected[valid])


def test_what_the_stage_says(table: pa.Table, cuts: list[list[Part]], inner: dict[str, Selector]) -> None:
    valid = valid_of(table)
    said = select({"it": AnyOf(selectors=inner)}, cuts[0]).stages[0]
    rows = [np.count_nonzero(often(selector, cuts)[valid]) for selector in inner.values()]
    assert [one["keeps"] for one in said["any_of"].values()] == rows
    best = said["any_of"]["best"]["thresholds"]["score"]
    assert said["thresholds"] == {"language_probability": [0.9], "score": best, "words": [28]}
    assert said["any_of"]["uids"]["copies"] == 400 > rows[1], "rows are counted, not copies"
    said = select({"it": AllOf(selectors=inner)}, cuts[0]).stages[0]
    assert [one["keeps"] for one in said["all_of"].values()] == rows


def test_it_changes_with_what_is_read_inside(tmp_path: Path) -> None:
    contents = []
    for uid in ("a", "b"):
        (tmp_path / "list.txt").write_text(uid)
        both = AllOf(selectors={"mine": Uids(file=str(tmp_path / "list.txt"))})
        contents.append(AnyOf(selectors={"both": both}).content())
    assert contents[0] != contents[1]


NESTED = """
signals: {text: {kind: text}, language: {kind: language}}
selectors:
  either:
    kind: any_of
    selectors:
      english: {kind: language, languages: [en]}
      long: {kind: all_of, selectors: {w: {kind: threshold, column: caption_words, min: 9}}}
"""


def test_recipes_nest() -> None:
    config = parse_config(yaml.safe_load(NESTED))
    either = config.selectors["either"]
    assert isinstance(either, AnyOf) and list(either.selectors) == ["english", "long"]
    assert either.selectors["english"] == LanguageIs(languages=["en"])
    assert either.needs == ("language", "language_probability", "caption_words")
    plain = config.to_dict()
    assert plain["selectors"]["either"]["selectors"]["long"]["kind"] == "all_of"
    assert plain["selectors"]["either"]["selectors"]["long"]["selectors"]["w"]["missing"] == "drop"  # resolved
    assert parse_config(plain) == config


@pytest.mark.parametrize("kind", ["any_of", "all_of"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "{}: selectors is empty"),
        ({"selectors": ["x"]}, r"selectors\.x\.selectors: not a mapping"),
        ({"selectors": {"y": {"kind": "no"}}}, r"selectors\.x\.selectors\.y\.kind: 'no' is unknown"),
        ({"selectors": {"y": {"kind": "near_duplicates"}}}, r"{}: selectors\.y compares what others left"),
        ({"selectors": {"y": {"kind": "image_based", "reference": "r.npy", "clusters": 9}}}, "compares what others"),
        ({"any": 1, "selectors": {"y": {"kind": "caption_rules"}}}, r"selectors\.x\.any: unknown"),
        (
            {"selectors": {"y": {"kind": "threshold", "column": "nothing", "min": 1}}},
            r"selectors\.x\.selectors\.y: column nothing is not measured",
        ),
        (
            {"selectors": {"y": {"kind": "threshold", "column": "uid", "min": 1}}},
            r"selectors\.x\.selectors\.y\.column: uid holds no numbers",
        ),
    ],
)
def test_settings_are_refused_by_name(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{}", kind)):
        parse_config({"signals": {"text": {"kind": "text"}}, "selectors": {"x": {"kind": kind, **settings}}})
