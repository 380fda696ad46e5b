"""The bench itself: rows as the contract has them, medians of alternating sides, honest verdicts; no speed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.case import Case
from benchmarks.run import GROUPS, measure
from tests.conftest import ROOT

CONTRACT = {
    "name": str, "area": str, "ours": float, "peer": float, "peer_name": str, "ratio": float, "better": str,
    "reach": float, "passed": bool, "unit": str, "runs": int, "command": str,
}  # fmt: skip


def case(ours: list[float], peer: list[float], better: str, reach: float, calls: list[str]) -> Case:
    figures = {"ours": iter(ours), "peer": iter(peer)}

    def side(name: str) -> float:
        calls.append(name)
        return next(figures[name])

    return Case(
        name="row",
        area="training",
        unit="s",
        better=better,  # type: ignore[arg-type]
        reach=reach,
        peer_name="another",
        ours=lambda: side("ours"),
        peer=lambda: side("peer"),
    )


@pytest.mark.parametrize(
    ("better", "reach", "passed"),
    [("lower", 0.5, True), ("lower", 0.49, False), ("higher", 0.5, True), ("higher", 0.51, False)],
)
def test_medians_without_the_first_run_and_an_honest_verdict(better: str, reach: float, passed: bool) -> None:
    calls: list[str] = []
    row = measure(case([99.0, 1.0, 2.0, 30.0], [0.1, 4.0, 4.0, 5.0], better, reach, calls), 3)
    assert (row["ours"], row["peer"], row["ratio"], row["passed"]) == (2.0, 4.0, 0.5, passed)
    assert row["runs"] == 3 and row["ours_runs"] == [1.0, 2.0, 30.0]
    pairs = [tuple(calls[i : i + 2]) for i in range(0, 8, 2)]
    assert set(pairs) == {("ours", "peer"), ("peer", "ours")}, "the side that begins changes"


def test_a_figure_may_be_the_mean_of_several_calls() -> None:
    calls: list[str] = []
    one = dataclasses.replace(case([99.0, 1.0, 3.0, 5.0, 9.0], [9.0, 2.0, 2.0, 4.0, 4.0], "lower", 1.0, calls), calls=2)
    row = measure(one, 2)
    assert (row["ours_runs"], row["peer_runs"]) == ([2.0, 7.0], [2.0, 4.0])
    assert calls[:6] == ["peer", "ours", "ours", "peer", "peer", "ours"]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quick_rows_keep_the_contract_and_the_rows_of_others(tmp_path: Path) -> None:
    """Really curates, copies and writes, on a few samples."""
    out = tmp_path / "latest.json"
    out.write_text(json.dumps([{"name": "step_retained_256", "kept": True}, {"name": "build_keep_0.2", "old": True}]))
    done = bench("--quick", "--only", "build_keep", "--out", str(out), "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["build_keep_1.0", "build_keep_0.2", "step_retained_256"]
    assert rows[2] == {"name": "step_retained_256", "kept": True}
    for row in rows[:2]:
        assert {name: type(row[name]) for name in CONTRACT} == CONTRACT
        assert row["ours"] > 0 and row["peer"] > 0 and row["passed"] == (row["ratio"] <= row["reach"])
        assert row["name"] in done.stdout and row["command"].endswith(f"--only {row['name']}")
    assert list(tmp_path.iterdir()) == [out], "the data is removed"


def test_refusals(tmp_path: Path) -> None:
    unknown = bench("--only", "nonsense", "--out", str(tmp_path / "x.json"))
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: --only nonsense: ")
    assert all(name in unknown.stderr for _, names in GROUPS.values() for name in names)
    assert bench("--quick").returncode == 2, "quick figures must not become the results"
