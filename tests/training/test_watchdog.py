"""Two real gloo ranks of which one stands still: the line names it, its source line and where the other waits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.launch import free_port
from tests.conftest import ROOT
from training.watchdog import EXIT_CODE, verdict

SCRIPT = ROOT / "tests/training/rank_hang.py"


def line_of(mark: str) -> int:
    return next(n for n, line in enumerate(SCRIPT.read_text().splitlines(), 1) if f"# {mark}" in line)


def two_ranks(run: Path, way: str) -> tuple[list[int], str]:
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(run), way],
            env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in (0, 1)
    ]
    said = [p.communicate(timeout=120)[0] for p in processes]
    assert "hang" not in said[1], "rank 0 speaks for all"
    return [p.returncode for p in processes], said[0]


def test_the_rank_that_others_wait_for_is_named(tmp_path):
    begun = time.monotonic()
    codes, said = two_ranks(tmp_path, "sleeps")
    assert codes == [EXIT_CODE, EXIT_CODE] and time.monotonic() - begun < 60
    (line,) = [x for x in said.splitlines() if x.startswith("hang: ")]
    name = "tests/training/rank_hang.py"
    assert f"rank 1 hangs at {name}:{line_of('the line')} in read_from_a_dead_disk" in line
    assert "after step 1, waiting for data" in line
    assert f"rank 0 waits at {name}:{line_of('the wait')} in agree, collective 2 (all_reduce)" in line
    for rank, function in ((0, "agree"), (1, "read_from_a_dead_disk")):
        log = (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()
        assert f"in {function}" in log and "in main" in log and log.count("hread 0x") >= 2, "all threads' stacks"


def test_a_rank_that_keeps_a_ring_waiting_is_named(tmp_path):
    """A block is sent and awaited in two steps; the wait itself is nowhere in torch.distributed's own functions."""
    codes, said = two_ranks(tmp_path, "ring")
    assert codes == [EXIT_CODE, EXIT_CODE]
    (line,) = [x for x in said.splitlines() if x.startswith("hang: ")]
    name = "tests/training/rank_hang.py"
    assert f"rank 1 hangs at {name}:{line_of('the line')} in read_from_a_dead_disk" in line
    waits = f"{name}:{line_of('the ring')} in pass_round, collective 2 (batch_isend_irecv)"
    assert f"rank 0 waits at {waits}" in line
    assert json.loads((tmp_path / "ranks" / "hang_00000.json").read_text())["waits"]


def test_a_rank_that_holds_the_interpreter_ends_too(tmp_path):
    codes, said = two_ranks(tmp_path, "computes")
    assert codes == [EXIT_CODE, 1]
    (line,) = [x for x in said.splitlines() if x.startswith("hang: ")]
    assert "rank 1 left no word" in line and "rank 0 waits at tests/training/rank_hang.py" in line
    assert f"line {line_of('in C')} in main" in (tmp_path / "logs" / "rank_00001.log").read_text()


def published(rank: int, collectives: int, *, waits: bool = False, at: str = "a.py:1 in f") -> dict[str, object]:
    facts = {"rank": rank, "step": 7, "phase": "computing", "at": at, "ours": at}
    return {**facts, "collectives": collectives, "last": "all_reduce", "waits": waits}


@pytest.mark.parametrize(
    ("ranks", "size", "expected"),
    [
        ({0: published(0, 9, waits=True)}, 3, "ranks 1, 2 left no word"),
        ({r: published(r, 9, waits=True) for r in range(4)}, 4, "all ranks wait in collective 9 (all_reduce)"),
        ({r: published(r, 9, waits=r != 2, at=f"r{r}.py:3 in g") for r in range(4)}, 4, "rank 2 hangs at r2.py:3 in g"),
        ({r: published(r, 9 - (r > 1), waits=True) for r in range(4)}, 4, "rank 2 hangs at a.py:1 in f (after step 7"),
        ({r: published(r, 9 - (r > 1), waits=True) for r in range(4)}, 4, "(as does rank 3); rank 0 waits at"),
        ({r: published(r, 9, waits=False) for r in range(2)}, 2, "none is inside one"),
    ],
)
def test_the_verdict_by_what_ranks_publish(ranks, size, expected):
    line = verdict(ranks, size, 600.0)
    assert expected in line and "\n" not in line
