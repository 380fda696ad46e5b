"""A full disk, a pool that changes under the run, and counts that do not add up: one line, no false completeness, and
the same bytes once the cause is gone.

The workers run in this process where that is no part of the question.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curation import phases, pipeline
from curation.config import parse_config
from curation.errors import UserError, exit_code
from curation.pipeline import curate
from curation.workers import Workers
from jobs.cli import COMMANDS
from tests.curation.conftest import sample, write_tar
from tests.curation.test_kill import RECIPE, digests, here

PAGE = 4096


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", {str(n): sample(n) for n in range(shard * 20, shard * 20 + 20)})
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)


def complete(out: Path) -> set[str]:
    """The phases that say they are."""
    return {p.name.removesuffix("manifest.json").rstrip(".") or "all" for p in out.glob("*manifest.json")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """(a folder on a disk of its own, what makes that disk so many pages large)"""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={2 * PAGE}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")

    def resize(pages: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", str(folder)], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_at_every_size_until_all_fits(
    raw: Path, tmp_path: Path, small_disk: tuple[Path, Callable[[int], None]], in_process: None
) -> None:
    folder, resize = small_disk
    config = parse_config(RECIPE)
    curate(config, pools=[str(raw)], out=tmp_path / "out")
    pages, stopped = 2, {}
    while True:
        resize(pages)
        try:
            curate(config, pools=[str(raw)], out=folder / "out")
            break
        except UserError as error:
            stopped[pages] = frozenset(complete(folder / "out"))
            assert "\n" not in str(error) and "all" not in stopped[pages]
            assert f"--out {folder / 'out'}: no space left on the disk" in str(error)
            assert "run the same command again" in str(error)
        assert not list((folder / "out").rglob("*.tmp")), "what was half written stays and fills the disk"
        pages += 8
    # The page and the cards after a build need less than it frees, so that it need not stop there.
    built = frozenset({"measure", "select", "build"})
    assert {*stopped.values(), built} == {frozenset(), frozenset({"measure"}), frozenset({"measure", "select"}), built}
    assert digests(folder / "out") == digests(tmp_path / "out")


def test_a_limit_of_file_sizes_at_every_size_until_all_fits(raw: Path, tmp_path: Path, in_process: None) -> None:
    """What a full disk is where this user may mount none: a write that the system cuts short."""
    config, before = parse_config(RECIPE), resource.getrlimit(resource.RLIMIT_FSIZE)
    curate(config, pools=[str(raw)], out=tmp_path / "out")
    stopped, size = set(), 256
    while True:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            curate(config, pools=[str(raw)], out=tmp_path / "limited")
            break
        except UserError as error:
            stopped.add(frozenset(complete(tmp_path / "limited")))
            assert "\n" not in str(error) and "a file grows beyond the limit" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list((tmp_path / "limited").rglob("*.tmp"))
        size = size * 5 // 4
    assert {frozenset(), frozenset({"measure"})} <= stopped, "it was not stopped in measure and in select"
    assert digests(tmp_path / "limited") == digests(tmp_path / "out")


def test_a_full_disk_of_a_worker_is_one_line_and_exit_code_2(
    raw: Path, small_disk: tuple[Path, Callable[[int], None]], tmp_path: Path, ray_here: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, resize = small_disk
    resize(8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("signals: {text: {kind: text}}\nunit_samples: 5\n")
    words = ["--config", str(recipe), "--pool", str(raw), "--workers", "1"]
    words += ["--out", str(tmp_path / "out"), "--signals", str(folder / "store")]
    assert exit_code(lambda: COMMANDS["curate"][1](words)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"error: --out {tmp_path / 'out'} or {folder / 'store'}: no space left on the disk")
    assert not complete(tmp_path / "out")


def test_any_other_failure_of_a_disk_keeps_its_name(raw: Path, tmp_path: Path, ray_here: None) -> None:
    with Workers(1, None) as workers, pytest.raises(FileNotFoundError) as failure:
        list(workers.map(lambda: lambda name: Path(name).read_text(), [str(tmp_path / "none")]))
    assert failure.value.filename == str(tmp_path / "none")


@pytest.mark.parametrize("phase", ["select", "build"])
@pytest.mark.parametrize("change", ["longer", "gone", "touched"])
def test_a_pool_that_changes_between_phases(
    raw: Path, tmp_path: Path, in_process: None, phase: str, change: str
) -> None:
    pool, out = tmp_path / "pool", tmp_path / "out"
    shutil.copytree(raw, pool)
    config, before = parse_config(RECIPE), ("measure", "select")[: 1 if phase == "select" else 2]
    for name in before:
        curate(config, pools=[str(pool)], out=out, phase=name)
    shard = pool / "1.tar"
    kept, stat = shard.read_bytes(), shard.stat()
    if change == "gone":
        shard.unlink()
    elif change == "longer":
        shard.write_bytes(kept + bytes(512))
    else:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    for wanted in (phase, "all"):
        with pytest.raises(UserError, match=r"holds another run \(different pool\).*--overwrite"):
            curate(config, pools=[str(pool)], out=out, phase=wanted)
    assert complete(out) == set(before)
    shard.write_bytes(kept)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert curate(config, pools=[str(pool)], out=out)["seen"] == 60


def test_a_pool_that_changes_under_the_run(
    raw: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command runs all phases; between its selection and its build a shard is written anew."""
    pool, out, config = tmp_path / "pool", tmp_path / "out", parse_config(RECIPE)
    shutil.copytree(raw, pool)
    shard = pool / "2.tar"
    kept, stat = shard.read_bytes(), shard.stat()

    def changed(run: phases.Run) -> dict[str, Any]:
        shard.write_bytes(kept[::-1])
        return phases.build(run)

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STEPS, "build", changed)
        with pytest.raises(UserError, match=r"2\.tar has changed since it was measured"):
            curate(config, pools=[str(pool)], out=out)
    assert complete(out) == {"measure", "select"} and not (out / "shards").exists()
    shard.write_bytes(kept)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    curate(config, pools=[str(pool)], out=out)
    curate(config, pools=[str(pool)], out=tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def lose_one(counts: dict[str, Any]) -> dict[str, Any]:
    return {**counts, "kept": counts["kept"] - 1}


def move_one(counts: dict[str, Any]) -> dict[str, Any]:
    """In all it still adds up, but a stage says otherwise."""
    dropped = {**counts["dropped"], "copies": counts["dropped"].get("copies", 0) + 1}
    return {**counts, "kept": counts["kept"] - 1, "dropped": dropped}


@pytest.mark.parametrize("wrong", [lose_one, move_one])
def test_counts_that_do_not_add_up_end_the_command(
    raw: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., dict[str, Any]]
) -> None:
    real = phases.write_ledger
    monkeypatch.setattr(phases, "write_ledger", lambda *a, **k: wrong(real(*a, **k)))
    with pytest.raises(RuntimeError, match="conservation"):
        curate(parse_config(RECIPE), pools=[str(raw)], out=tmp_path / "out")
    assert complete(tmp_path / "out") == {"measure"}


def test_a_ledger_that_lost_a_sample_after_selection_builds_nothing_complete(
    raw: Path, tmp_path: Path, in_process: None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    config, out = parse_config(RECIPE), tmp_path / "out"
    assert curate(config, pools=[str(raw)], out=out, phase="measure")["seen"] == 60
    curate(config, pools=[str(raw)], out=out, phase="select")
    part = next(p for p in sorted((out / "ledger").iterdir()) if pq.read_table(p)["copies"][0].as_py())
    table = pq.read_table(part)
    copies = [0, *table["copies"].to_pylist()[1:]]
    place = table.schema.get_field_index("copies")
    pq.write_table(table.set_column(place, "copies", pa.array(copies, pa.int32())), part)
    with pytest.raises(RuntimeError, match=r"conservation: \d+ kept, \d+ in the shards"):
        curate(config, pools=[str(raw)], out=out)
    assert complete(out) == {"measure", "select"}
