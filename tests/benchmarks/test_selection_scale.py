"""Selectors that hold most, at two sizes: memory of driver and workers follows not the pool, nor time its square."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.selection_scale import KINDS, RESULTS, figures
from tests.conftest import ROOT


@pytest.mark.long
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("kind", ["columns", "embeddings"])
def test_memory_does_not_follow_the_pool(kind: str, tmp_path: Path) -> None:
    """The smaller pool has five partitions, so that workers do the work in both."""
    rows = {"columns": 2_800_000, "embeddings": 1_120_000}[kind]
    out = tmp_path / "out.json"
    command = ["--work", str(tmp_path), "--kind", kind, "--rows", str(rows), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.selection_scale", *command], cwd=ROOT, check=True)
    found = json.loads(out.read_text())["kinds"][kind]
    assert all(size["kept"] and min(size["dropped"].values()) for size in found["sizes"].values())
    assert {name: figure["value"] for name, figure in found["figures"].items() if not figure["passed"]} == {}


@pytest.mark.parametrize(
    ("missed", "large"),
    [
        (None, {"driver_mib": 329.0, "worker_mib": 344.0, "wall_s": 119.0}),
        ("driver_growth", {"driver_mib": 331.0, "worker_mib": 300.0, "wall_s": 100.0}),
        ("worker_growth", {"driver_mib": 300.0, "worker_mib": 346.0, "wall_s": 100.0}),
        ("time_growth_over_rows", {"driver_mib": 300.0, "worker_mib": 300.0, "wall_s": 121.0}),
    ],
)
def test_figures_by_hand(missed: str | None, large: dict[str, float]) -> None:
    found = figures({"1": {"driver_mib": 300.0, "worker_mib": 300.0, "wall_s": 10.0}, "10": large}, 10)
    assert [name for name, figure in found.items() if not figure["passed"]] == ([missed] if missed else [])
    assert found["driver_mib"]["value"] == max(300.0, large["driver_mib"])


def test_the_results_say_what_they_reach() -> None:
    for name, kind in json.loads(RESULTS.read_text())["kinds"].items():
        assert kind["figures"] == figures(kind["sizes"], KINDS[name].times)


def test_memory_is_a_process_own_highest() -> None:
    """A peak before the look is seen, and a process does not begin with the memory of the one that started it."""
    code = "import os, sys; from benchmarks.selection_scale import _highest; begun = _highest(os.getpid())\n"
    code += "held = b'x' * (300 << 20); del held; print(begun, _highest(os.getpid()), _highest(2**22 + 1))"
    held = b"x" * (600 << 20)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    begun, highest, gone = map(int, done.stdout.split())
    assert begun < len(held) and 280 << 20 < highest - begun < 320 << 20 and gone == 0
