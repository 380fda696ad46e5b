"""Two real gloo ranks of which one stands still: the line names it, its source line and where the other waits."""

import _thread
import json
import threading
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.ranks import group_of
from training.distributed import World
from training.watchdog import EXIT_CODE, _position, verdict

SCRIPT = ROOT / "tests/training/rank_hang.py"


def line_of(mark: str) -> int:
    return next(n for n, line in enumerate(SCRIPT.read_text().splitlines(), 1) if f"# {mark}" in line)


def two_ranks(run: Path, way: str, *fails: int) -> tuple[list[int | None], str]:
    codes, said = group_of(SCRIPT.name, 2, run, way, timeout=200, fails=(EXIT_CODE, *fails))
    assert "hang" not in said[1], "rank 0 speaks for all"
    return codes, said[0]


def test_the_rank_that_others_wait_for_is_named(tmp_path):
    codes, said = two_ranks(tmp_path, "sleeps")
    assert codes == [EXIT_CODE, EXIT_CODE], "the disk is read for 600 s"
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
    codes, said = two_ranks(tmp_path, "computes", 1)
    assert codes == [EXIT_CODE, 1]
    (line,) = [x for x in said.splitlines() if x.startswith("hang: ")]
    assert "rank 1 left no word" in line and "rank 0 waits at tests/training/rank_hang.py" in line
    assert f"line {line_of('in C')} in main" in (tmp_path / "logs" / "rank_00001.log").read_text()


@pytest.mark.parametrize("hooks", [False, True])
def test_who_asks_for_what_is_not_reduced_yet_waits(hooks, monkeypatch):
    """NCCL's calls return before their work is done, and the copy that comes next waits for it; in a GPU's backward
    pass in a thread of torch's, which no Python began."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    copying, done = threading.Event(), threading.Event()

    class OnDevice:
        device = "cpu"
        copies = 0

        def to(self, _):
            self.copies += 1
            if self.copies == 2:
                copying.set()
                done.wait()
            return self

    def reduces():
        World(0, 2).sum(OnDevice())

    held = threading.Lock()
    held.acquire()

    def _engine_run_backward():
        _thread.start_new_thread(reduces, ())
        held.acquire()

    rank = threading.Thread(target=_engine_run_backward if hooks else reduces)
    rank.start()
    try:
        assert copying.wait(60) and not _position(threading.get_ident())["waits"]
        found = _position(rank.ident)
        assert found["waits"] and found["ours"].endswith(" in to"), found
    finally:
        done.set()
        held.release()
        rank.join()


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
        (
            {r: published(r, 9, at=f"r{r % 2}.py:3 in g") for r in range(5)},
            5,
            "none is inside one: ranks 1, 3 at r1.py:3 in g (after step 7, computing); ranks 0, 2, 4 at r0.py:3 in g (",
        ),
    ],
)
def test_the_verdict_by_what_ranks_publish(ranks, size, expected):
    line = verdict(ranks, size, 600.0)
    assert expected in line and "\n" not in line
