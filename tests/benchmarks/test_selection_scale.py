"""Selectors that hold most, at two sizes: neither the driver's memory nor a worker's follows the pool's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert found["driver_growth"] <= 1.1 and found["worker_growth"] <= 1.15
    assert max(size["driver_mib"] for size in found["sizes"].values()) < 600
