"""The cost of a pool from measured rows: the arithmetic by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.cost import PHASES, Phase, core_hours, read, table
from benchmarks.run import GROUPS
from curation.errors import UserError

ROW = {"ours": 100.0, "peer": 25.0, "unit": "pairs/s", "device": "some processor, 4 cores"}


def test_core_hours() -> None:
    assert core_hours(ROW, 360_000, Phase("", "")) == 4.0  # an hour on four cores
    assert core_hours(ROW, 360_000, Phase("", "", single=True)) == 1.0
    assert core_hours(ROW, 360_000, Phase("", "", side="peer")) == 16.0
    build = {**ROW, "ours": 0.5, "unit": "s"}
    assert core_hours(build, 7_200 * 80, Phase("", "", pairs=80)) == 4.0


def test_table_has_every_phase_and_names_what_is_missing(tmp_path: Path) -> None:
    known = {phase.row: ROW for phase in PHASES if phase.row != "selection_scale"}
    assert set(known) <= {name for _, names in GROUPS.values() for name in names}
    (tmp_path / "latest.json").write_text(json.dumps([{"name": name, **row} for name, row in known.items()]))
    sizes = {"900": {"wall_s": 1.0}, "10000": {"wall_s": 20.0}}
    columns = {"sizes": sizes, "device": ROW["device"]}
    (tmp_path / "scale.json").write_text(json.dumps({"kinds": {"columns": columns}}))
    rows = read(tmp_path / "latest.json", tmp_path / "scale.json")
    assert rows["selection_scale"]["ours"] == 500.0
    printed = table(rows, 12_800_000_000)
    assert all(phase.name in printed for phase in PHASES) and "384.0" in printed, "30 KB x 12.8 billion = 384 TB"
    assert "Not measured" not in printed
    del rows["reselect"]
    assert "Not measured yet: `reselect`." in table(rows, 1)
    with pytest.raises(UserError, match="has no row of curation; run make bench"):
        table({}, 1)
