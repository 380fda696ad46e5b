"""The cost of a pool from measured rows: the arithmetic by hand."""

import pytest

from benchmarks.cost import BUILD_PAIRS, PHASES, core_hours, table
from benchmarks.run import GROUPS
from curation.errors import UserError

ROW = {"ours": 100.0, "unit": "pairs/s", "device": "some processor, 4 cores"}


def test_core_hours() -> None:
    assert core_hours(ROW, 360_000, single=False) == 4.0  # an hour on four cores
    assert core_hours(ROW, 360_000, single=True) == 1.0
    build = {**ROW, "ours": 0.5, "unit": "s"}
    assert core_hours(build, 7_200 * BUILD_PAIRS, single=False) == 4.0


def test_table_has_every_phase_and_names_what_is_missing() -> None:
    rows = {phase.row: ROW for phase in PHASES}
    assert set(rows) <= {name for _, names in GROUPS.values() for name in names}
    printed = table(rows, 12_800_000_000)
    assert all(phase.name in printed for phase in PHASES) and "384.0" in printed, "30 KB x 12.8 billion = 384 TB"
    assert "Not measured" not in printed
    del rows["reselect"]
    assert "Not measured yet: `reselect`." in table(rows, 1)
    with pytest.raises(UserError, match="has no row of curation; run make bench"):
        table({}, 1)
