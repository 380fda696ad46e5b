"""Collectives of two real gloo ranks, through DeepSpeed and beside it, against a count by hand."""

import json
import subprocess
import sys
from pathlib import Path

from jobs.launch import free_port
from tests.conftest import ROOT


def test_two_ranks_count_what_they_send(tmp_path):
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
    command += [str(free_port()), str(ROOT / "tests/training/rank_traffic.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    files = sorted(tmp_path.glob("rank_*.json"))
    assert len(files) == 2, done.stdout[-2000:] + done.stderr[-4000:]
    first, second = (json.loads(f.read_text()) for f in files)
    assert first == second
    mib = 2**20
    assert first["known"] == {
        "all_reduce_mib": 10 * 8 / mib,
        "all_gather_mib": (2 * 3 * 4 * 4 + 2 * 5 * 4 + 8 * 4) / mib,
        "reduce_scatter_mib": (6 * 2 * 4 + 8 * 4) / mib,
        "broadcast_mib": 7 * 2 / mib,
        "all_reduce_calls": 1,
        "all_gather_calls": 3,
        "reduce_scatter_calls": 2,
        "broadcast_calls": 1,
        "barrier_calls": 1,
    }
    layer = 64 * 64 * 4 / mib
    print(json.dumps({stage: first[stage] for stage in ("zero2", "zero3")}))
    assert first["zero3"]["reduce_scatter_mib"] == 2 * layer, "every gradient once"
    assert first["zero3"]["all_gather_mib"] == 4 * layer, "every weight for the forward and again for the backward"
    assert first["zero2"]["all_gather_mib"] == 2 * layer, "every weight after the step"
