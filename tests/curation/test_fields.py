"""Fields of the json as columns, and selection by their values, against plain Python."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.selection.block_list import BlockList
from curation.selection.values import Values
from tests.curation.conftest import sample, write_tar
from tests.curation.test_selection import keeps, write_parts
from tests.curation.test_signals import measure_alone

FIELDS = {"license": "string", "pwatermark": "float32", "big": "float64", "opt_out": "bool", "n": "int64"}
RECORDS: list[tuple[str, dict[str, object]]] = [
    ('{"license": "cc-by", "pwatermark": 0.25, "big": 3, "opt_out": true, "n": 7}', {}),
    ('{"license": 3, "pwatermark": "0.25", "big": true, "opt_out": 1, "n": 7.0}', dict.fromkeys(FIELDS)),
    ('{"license": null, "pwatermark": [1], "opt_out": "no", "n": true}', dict.fromkeys(FIELDS)),
    ("{}", dict.fromkeys(FIELDS)),
    (
        '{"license": "\\ud800x", "pwatermark": 2, "big": 1e999, "opt_out": false, "n": -9223372036854775808}',
        {"license": "?x", "big": None},
    ),
    (f'{{"n": 9223372036854775808, "big": 1{"0" * 400}, "pwatermark": 0.5}}', {"big": None, "n": None}),
    ('{"big": NaN, "pwatermark": 1e300, "n": 1}', {"big": None, "pwatermark": None}),
    ('{"big": 1e300, "pwatermark": -Infinity}', {"pwatermark": None}),
]


def test_what_has_the_type_is_there_and_nothing_else(tmp_path: Path) -> None:
    samples = {str(i): sample(i, json=text.encode()) for i, (text, _) in enumerate(RECORDS)}
    samples["none"] = {k: v for k, v in sample(9).items() if k != "json"}
    write_tar(tmp_path / "pool" / "0.tar", samples)
    rows = measure_alone(tmp_path / "pool", tmp_path / "out", {"f": {"kind": "fields", "fields": FIELDS}})
    assert [row["error"] for row in rows] == [None] * 9
    for row, (text, odd) in zip(rows, RECORDS):  # an odd one says what differs from the json
        expected = {**dict.fromkeys(FIELDS), **json.loads(text), **odd}
        if expected["pwatermark"] is not None:
            expected["pwatermark"] = float(np.float32(expected["pwatermark"]))
        assert {field: row[field] for field in FIELDS} == expected
    assert {rows[8][field] for field in FIELDS} == {None}


def test_settings_that_cannot_work_are_refused_by_name() -> None:
    def refused(signal: dict[str, object], selector: dict[str, object] | None, message: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_config({"signals": {"f": signal}, "selectors": {"v": selector} if selector else {}})

    signal = {"kind": "fields", "fields": FIELDS}
    refused({"kind": "fields", "fields": {}}, None, "no field is named; write fields: {license: string}")
    refused({"kind": "fields", "fields": {"a": "text"}}, None, r"signals\.f: .*text")
    refused({"kind": "fields", "fields": {"uid": "string"}}, None, "column uid is already")
    refused(signal, {"kind": "values", "column": "license"}, "values on license: set exactly one of allow and deny")
    refused(signal, {"kind": "values", "column": "license", "allow": ["a"], "deny": ["b"]}, "exactly one")
    refused(signal, {"kind": "values", "column": "license", "allow": [3]}, r"selectors\.v: .*license: 3 is no str")
    refused(signal, {"kind": "values", "column": "n", "deny": [True]}, "n: True is no int")
    refused(signal, {"kind": "values", "column": "big", "deny": [1]}, "big: it is double; name a column of text")


ROWS = 10_000
LICENSES = ["cc0", "CC-BY", "cc-by", "arr", None, "", "ß"]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "uid": [f"{n:032x}" for n in range(ROWS)],
            "error": pa.array(["image_decode" if n % 50 == 7 else None for n in range(ROWS)], pa.string()),
            "license": pa.array([LICENSES[i] for i in rng.integers(0, len(LICENSES), ROWS)], pa.string()),
            "opt_out": pa.array([[True, False, None][i] for i in rng.integers(0, 3, ROWS)], pa.bool_()),
            "n": pa.array([[3, 4, None][i] for i in rng.integers(0, 3, ROWS)], pa.int64()),
        }
    )


@pytest.mark.parametrize("missing", [None, "drop", "keep"])
@pytest.mark.parametrize(
    ("column", "listed"), [("license", ["cc0", "cc-by"]), ("license", [""]), ("opt_out", [True]), ("n", [4, 9])]
)
@pytest.mark.parametrize("way", ["allow", "deny"])
def test_values_against_plain_python(
    table: pa.Table, tmp_path: Path, way: str, column: str, listed: list[object], missing: str | None
) -> None:
    parts = write_parts(tmp_path, table, [1, 1, 900, 9_999])

    def keep(value: object, ignore_case: bool) -> bool:
        if value is None:
            return missing == "keep" if missing else way == "deny"
        if ignore_case and isinstance(value, str):
            value = value.lower()
        return (value in listed) == (way == "allow")

    rows = list(zip(table["error"].to_pylist(), table[column].to_pylist()))
    for ignore_case in (False, True):
        selector = Values(column=column, **{way: listed}, missing=missing, ignore_case=ignore_case)
        expected = [error is not None or keep(value, ignore_case) for error, value in rows]
        np.testing.assert_array_equal(keeps(selector, parts), expected)
        assert 0 < sum(expected) < ROWS


def test_a_block_list_works_on_a_field(table: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("arr  # all rights reserved\nCC-BY\n")
    kept = keeps(BlockList(column="license", file=str(tmp_path / "list.txt")), write_parts(tmp_path, table, []))
    rows = zip(table["error"].to_pylist(), table["license"].to_pylist())
    np.testing.assert_array_equal(kept, [error is not None or value not in ("arr", "CC-BY") for error, value in rows])


def test_the_recipe_for_licences_and_opt_outs() -> None:
    config = load_config(Path("recipes/curate/licences.yaml"))
    assert {type(s).__name__ for s in config.selectors.values()} >= {"Values", "Threshold"}
