"""Pools behind a connection that fails: what may pass is tried again, and the rest is one line that names the file."""

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from curation.errors import UserError
from curation.pool import list_shards
from curation.sources import open_shard
from tests.curation.conftest import write_tar
from tests.curation.test_kill import in_this_process
from tests.curation.test_pool_faults import pairs, put, run


class Unsteady(MemoryFileSystem):
    """Memory where the first `failures` calls for a file's bytes fail, or give half of them."""

    protocol = "unsteady"
    store: dict[str, Any] = {}  # noqa: RUF012
    failures = 0
    failure: OSError = ConnectionResetError("reset by peer")
    halves = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("unsteady://", "memory://"))

    def get_file(self, path: str, local: str, **options: Any) -> None:
        cls = type(self)
        if cls.failures:
            cls.failures -= 1
            raise cls.failure
        super().get_file(path, local, **options)
        if cls.halves:
            cls.halves -= 1
            os.truncate(local, os.path.getsize(local) // 2)


class Ranged(Unsteady):
    """The same for each range that is read of an open file, as object stores read it."""

    protocol = "ranged"
    store: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("ranged://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Ranges(self, path) if mode == "rb" else super()._open(path, mode, **options)


class Ranges(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        if Ranged.failures:
            Ranged.failures -= 1
            raise Ranged.failure
        return self.fs.store[self.path].getvalue()[start:end]


for kind in (Unsteady, Ranged):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited, in seconds."""
    waited: list[float] = []
    monkeypatch.setattr("curation.files.time.sleep", waited.append)
    return waited


def test_a_connection_that_fails_twice_and_then_cuts_short(
    tmp_path: Path, pauses: list[float], temporary: Path
) -> None:
    write_tar(tmp_path / "pool" / "0.tar", pairs(9))
    pool = put(tmp_path / "pool", f"unsteady://{tmp_path.name}")
    Unsteady.failures, Unsteady.halves = 2, 1
    assert run(pool, tmp_path / "out")["kept"] == 9
    assert pauses == [0.5, 1.0, 2.0] and (Unsteady.failures, Unsteady.halves) == (0, 0)
    run(tmp_path / "pool", tmp_path / "here")
    shards = [{p.name: p.read_bytes() for p in (tmp_path / o / "shards").iterdir()} for o in ("out", "here")]
    assert shards[0] == shards[1]


def test_a_connection_that_never_comes_back_is_an_error_that_names_the_shard(
    tmp_path: Path, pauses: list[float], temporary: Path
) -> None:
    write_tar(tmp_path / "pool" / "0.tar", pairs(3))
    pool = put(tmp_path / "pool", f"unsteady://{tmp_path.name}")
    Unsteady.failures = 100
    try:
        with pytest.raises(UserError, match=r"--pool unsteady://.*0\.tar: cannot be read, 5 times .*reset by peer"):
            run(pool, tmp_path / "out")
    finally:
        Unsteady.failures = 0
    assert len(pauses) == 4
    assert run(pool, tmp_path / "out")["kept"] == 3  # and the same command goes on


def test_ranges_that_fail_change_neither_what_the_pool_is_nor_its_rows(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "pool" / "0.tar", pairs(2))
    pq.write_table(pa.table({"uid": ["ab"], "score": [0.5]}), tmp_path / "pool" / "scores.parquet")
    (tmp_path / "rows").mkdir()
    large = pa.table({"jpg": [os.urandom(100_000) for _ in range(4)]})  # more than what is read with the footer
    pq.write_table(large, tmp_path / "rows" / "0.parquet", row_group_size=2)
    pool, rows = (put(tmp_path / name, f"ranged://{tmp_path.name}/{name}") for name in ("pool", "rows"))
    monkeypatch.setattr(Ranged, "failures", 2)
    (shard,) = list_shards([pool])
    assert [Path(table).name for table in shard.metadata] == ["scores.parquet"] and pauses == [0.5, 1.0]
    with open_shard(f"{rows}/0.parquet") as tape:
        monkeypatch.setattr(Ranged, "failures", 3)
        found, damage = tape.samples()
        assert damage is None and [one.error for one in found] == [None] * 4 and Ranged.failures == 0
    for reading in (lambda: list_shards([pool]), lambda: open_shard(f"{rows}/0.parquet")):
        monkeypatch.setattr(Ranged, "failures", 100)
        with pytest.raises(UserError, match=r"--pool ranged://.*\.parquet: cannot be read, 5 times .*reset by peer"):
            reading()


def test_a_full_disk_is_not_tried_again(
    tmp_path: Path, pauses: list[float], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "pool" / "0.tar", pairs(3))
    pool = put(tmp_path / "pool", f"unsteady://{tmp_path.name}")
    monkeypatch.setattr(Unsteady, "failures", 1)
    monkeypatch.setattr(Unsteady, "failure", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"0\.tar: no space in .*set TMPDIR"):
        run(pool, tmp_path / "out")
    assert pauses == []
