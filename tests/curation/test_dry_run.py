"""`--dry-run` at every stage of a run: what it counts is what the run then does, and it writes nothing."""

import os
from pathlib import Path
from typing import Any

import pytest

from curation.config import parse_config
from curation.pipeline import curate
from curation.store import SignalSet
from curation.workers import Workers
from tests.curation.conftest import sample, write_tar
from tests.curation.test_kill import RECIPE, in_this_process


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for shard in range(3):
        write_tar(tmp_path / "pool" / f"{shard}.tar", {str(n): sample(n) for n in range(shard * 10, shard * 10 + 10)})
    return tmp_path / "pool"


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def asked(pool: Path, out: Path, **more: Any) -> dict[str, Any]:
    config = parse_config({**RECIPE, **more.pop("recipe", {})})
    before = files(out.parent)
    said = curate(config, pools=[str(pool)], out=out, dry_run=True, **more)
    assert files(out.parent) == before
    return said


def test_it_says_of_each_phase_what_is_done_and_what_would_be(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config, pools = tmp_path / "out", parse_config(RECIPE), [str(pool)]
    said = asked(pool, out)
    assert (said["measure"]["shards_measured"], said["measure"]["shards_to_measure"]) == (0, 3)
    assert [said[phase]["done"] for phase in ("measure", "select", "build")] == [False] * 3
    text = capsys.readouterr().out
    assert "pool: 3 shards" in text and "measure: 0 of 3 shards are measured (0 pairs), 3 are to be" in text
    assert "how many pairs 3 of them hold is not known" in text and "select: all samples by long, copies" in text
    assert "build: what is kept into shards of at most 4 samples" in text

    curate(config, pools=pools, out=out, phase="measure", part="1/3")
    said = asked(pool, out)["measure"]
    assert (said["shards_measured"], said["pairs_measured"], said["shards_to_measure"]) == (1, 10, 2)
    assert asked(pool, out, phase="measure", part="2/3")["measure"]["shards_to_measure"] == 1

    curate(config, pools=pools, out=out, phase="measure")
    said = asked(pool, out)
    assert said["measure"] == {
        **said["measure"],
        **{"done": True, "shards_measured": 3, "pairs_measured": 30, "shards_to_measure": 0, "pairs_to_measure": 0},
    }
    kept = curate(config, pools=pools, out=out, phase="select")["kept"]
    said = asked(pool, out)
    assert (said["select"]["done"], said["select"]["kept"], said["build"]["done"]) == (True, kept, False)
    curate(config, pools=pools, out=out, phase="build", part="2/3")
    assert asked(pool, out)["build"]["input_shards_copied"] == 1
    capsys.readouterr()
    manifest = curate(config, pools=pools, out=out)
    said = asked(pool, out)
    assert all(said[phase]["done"] for phase in ("measure", "select", "build"))
    assert said["build"]["shards"] == manifest["shards"]
    text = capsys.readouterr().out
    assert f"select: done, keeps {kept} of 30 by long, copies" in text and "build: done, " in text
    assert set(asked(pool, out, phase="select")) == {"pool", "refused", "select"}


def test_a_part_that_is_lost_and_a_shard_that_is_new_are_counted(pool: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "store", parse_config(RECIPE)
    curate(config, pools=[str(pool)], out=tmp_path / "a", phase="measure", signals=store)
    next(iter(store.glob("*/*-00001.parquet"))).unlink()  # half of a shard of two units
    write_tar(pool / "3.tar", {str(n): sample(n) for n in range(30, 37)})
    said = asked(pool, tmp_path / "b", signals=store)["measure"]
    counted = {name: said[name] for name in ("shards_measured", "pairs_measured", "shards_to_measure")}
    assert counted == {"shards_measured": 2, "pairs_measured": 25, "shards_to_measure": 2}
    assert (said["pairs_to_measure"], said["shards_not_looked_into"]) == (5, 1)
    assert curate(config, pools=[str(pool)], out=tmp_path / "b", phase="measure", signals=store)["measured"] == 12


def test_what_would_be_refused_is_said(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    curate(parse_config(RECIPE), pools=[str(pool)], out=out)
    said = asked(pool, out, recipe={"seed": 5})
    assert said["refused"] == ["seed"] and not said["build"]["done"]
    assert "holds another run (different seed): refused without --overwrite" in capsys.readouterr().out
    os.utime(pool / "0.tar")
    assert asked(pool, out)["refused"] == ["pool"]


def test_it_starts_no_ray_and_opens_no_shard(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(Workers, "map", never)
    monkeypatch.setattr(SignalSet, "path", never)
    assert asked(pool, tmp_path / "out")["measure"]["shards_to_measure"] == 3
