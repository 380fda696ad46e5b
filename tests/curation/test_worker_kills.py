"""A worker that is killed with SIGKILL in each phase, before its item and after it: the run goes on to the same bytes.

A worker kills itself in the midst of an item, so that the kill is certain to hit one at work. It is the signal that
anyone else would send, and Ray sees no more of it.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from curation import workers as workers_module
from curation.config import parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.selection import engine
from curation.signals import SIGNALS
from curation.workers import Workers
from tests.curation.test_kill import LIGHT, here
from tests.curation.test_pipeline import digests
from tests.curation.test_workers import free_cpus

Setup = Callable[[], Callable[[Any], Any]]
EXPECTED = {
    ("measure", "Measuring"): 2,  # scan and measure
    ("select", "_Bundled"): 2,
    ("build", "_Bundled"): 2,  # the plan
    ("build", "Copying"): 1,
    ("build", "function"): 1,  # the shards' checksums
}


def dying(setup: Setup, mark: str, before: bool) -> Setup:
    """`setup` for workers of which the first that is given an item is killed, before it or when it is done."""

    def begin() -> Callable[[Any], Any]:
        function = setup()

        def call(item: Any) -> Any:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return function(item)
            if not before:
                function(item)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    return begin


def test_a_worker_killed_in_each_phase(
    pool: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pools, out = parse_config(LIGHT), [str(pool)], tmp_path / "killed" / "out"
    cut = engine.partitions
    monkeypatch.setattr(engine, "partitions", lambda parts: cut(parts, rows=20))  # so that selection is on Ray
    spread, kills, phase = Workers.map, Counter[tuple[str, str]](), ""

    def with_kills(self: Workers, setup: Setup, items: Sequence[Any]) -> Iterator[Any]:
        kind = (phase, type(setup).__name__)
        if not items or kills[kind] == EXPECTED.get(kind, 0):
            return spread(self, setup, items)
        kills[kind] += 1
        return spread(self, dying(setup, str(tmp_path / f"mark{kills.total()}"), kills.total() % 2 == 0), items)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "map", here)
        curate(config, pools=pools, out=tmp_path / "whole" / "out")
    monkeypatch.setattr(Workers, "map", with_kills)
    for phase in ("measure", "select", "build"):
        manifest = curate(config, pools=pools, out=out, phase=phase, workers=2)
    assert kills == EXPECTED
    assert len(list(tmp_path.glob("mark*"))) == kills.total(), "a worker was not killed"
    assert manifest["seen"] == 140
    assert digests(out) == digests(tmp_path / "whole" / "out")


def test_a_sample_that_kills_each_worker_is_named_by_its_unit(
    pool: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit is waiting behind it at its worker and loses as many; it is not the one that is named."""

    @dataclass(frozen=True, kw_only=True)
    class Deadly:
        version: ClassVar[int] = 1

        def schema(self, name: str) -> dict[str, pa.DataType]:
            return {"lived": pa.int32()}

        def content(self) -> dict[str, Any]:
            return {}

        def load(self, name: str) -> "Deadly":
            return self

        def see(self, sample: Any) -> int:
            if sample.uid == f"{50:032x}":
                os.kill(os.getpid(), signal.SIGKILL)
            return 1

        def columns(self, seen: Sequence[int]) -> dict[str, pa.Array]:
            return {"lived": pa.array(seen, pa.int32())}

    monkeypatch.setattr(workers_module, "RETRIES", 1)
    monkeypatch.setitem(SIGNALS, "deadly", Deadly)
    config = parse_config({"signals": {"s": {"kind": "deadly"}}, "unit_samples": 8})
    with pytest.raises(UserError, match=r"dies each time at .*/00001\.tar, unit 1 \(8 samples\): .*; give") as error:
        curate(config, pools=[str(pool)], out=tmp_path / "out", workers=1)
    assert "\n" not in str(error.value)
    measured = {path.name.rpartition("-")[2] for path in (tmp_path / "out" / "signals").glob("*/*.parquet")}
    assert measured, "what came before it was measured"


class Holding:
    """Whoever else takes a CPU: with it, the cluster has one less."""

    def ready(self) -> bool:
        return True


@pytest.mark.timeout(120)
@pytest.mark.parametrize("left", [1, 0])
def test_a_cluster_that_shrinks_is_done_without_what_it_lost(
    left: int, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed worker finds its CPU taken: the others go on with its items, or without any others it ends in a line."""
    import ray

    gate, mark, count = tmp_path / "gate", str(tmp_path / "mark"), 2 if left else 1

    def work(item: int) -> int:
        if item == 0:
            while not gate.exists():
                time.sleep(0.05)
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return item

    monkeypatch.setattr(workers_module, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(workers_module, "LOST_SECONDS", 1.5)
    free_cpus(2)
    kind: Any = ray.remote(num_cpus=1)(Holding)
    holding = [kind.remote() for _ in range(2 - count)]  # and so no CPU is left
    try:
        ray.get([one.ready.remote() for one in holding])
        with Workers(count, None) as workers:
            results = workers.map(lambda: work, [*range(1, 30), 0, *range(30, 60)])
            found = [next(results) for _ in range(20)]
            deadline = time.monotonic() + 60
            while any(actor.start is not None for actor in workers._actors) and time.monotonic() < deadline:
                found.append(next(results))
            holding.append(kind.remote())
            taken = holding[-1].ready.remote()
            time.sleep(1.0)  # it waits for the CPU that becomes free
            gate.touch()
            if left:
                assert sorted([*found, *results]) == list(range(60))
            else:
                with pytest.raises(UserError, match=r"^workers: all are lost, .*the same command again"):
                    list(results)
            assert ray.get(taken, timeout=60)
    finally:
        for one in holding:
            ray.kill(one)


def test_workers_that_cannot_be_made_are_one_line(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node that does not have this package."""

    class Unborn:
        def __init__(self, folder: str) -> None:
            raise ModuleNotFoundError("No module named 'curation'")

        def start(self) -> None: ...

    monkeypatch.setattr(workers_module, "_Actor", Unborn)
    monkeypatch.setattr(workers_module, "RETRIES", 1)
    with (
        Workers(1, None) as workers,
        pytest.raises(UserError, match=r"^workers: none can be started; .* No module named 'curation'"),
    ):
        list(workers.map(lambda: abs, [1]))
