"""`curate` killed at every step that changes what is on disk, and run again: the bytes are those of a run in one go.

In the first test the workers run in this process, so that a kill can be put
before each rename, deletion, write and marker of theirs too, one after another.
In the second it is real processes and SIGKILL, at random moments.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import croissant, phases, pipeline
from curation.config import parse_config
from curation.pipeline import curate
from curation.pool import list_shards
from curation.workers import Workers
from tests.curation import test_pipeline
from tests.curation.conftest import sample, write_tar

RECIPE = {
    "signals": {"text": {"kind": "text"}, "fingerprints": {"kind": "fingerprints"}},
    "selectors": {
        "long": {"kind": "threshold", "column": "caption_chars", "min": 49},
        "copies": {"kind": "exact_duplicates"},
    },
    "unit_samples": 5,
    "shard_samples": 4,
}


class Killed(BaseException):
    """Nothing may catch it."""


def here(self: Workers, setup: Callable[[], Callable[[Any], Any]], items: Sequence[Any]) -> Iterator[Any]:
    function = setup() if items else None
    for item in items:
        assert function is not None
        yield function(item)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", {str(n): sample(n % 12) for n in range(shard * 8, shard * 8 + 8)})
    return folder


def lose_a_file(folder: Path, **options: object) -> None:
    """What a kill in the middle of `rmtree` leaves."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    if files:
        os.remove(files[0])


def write_half(descriptor: int, content: memoryview, offset: int, write: Callable[..., int] = os.pwrite) -> None:
    write(descriptor, content[: len(content) // 2], offset)


def write_half_text(path: Path, text: str, **options: object) -> None:
    path.write_bytes(text[: len(text) // 2].encode())


def nothing(*arguments: object, **options: object) -> None:
    pass


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, and without the page: it is made anew by each run, and its drawings would take most of the time."""
    monkeypatch.setattr(Workers, "map", here)
    for module in (phases, pipeline):
        monkeypatch.setattr(module, "write_report", nothing)


STEPS = (
    (os, "replace", nothing),
    (Path, "rename", nothing),
    (Path, "touch", nothing),
    (shutil, "rmtree", lose_a_file),
    (os, "pwrite", write_half),
    (Path, "write_text", write_half_text),
)


def run_until(number: int, patch: pytest.MonkeyPatch, run: Callable[[], Any]) -> bool:
    """Whether `run` came to its `number`-th step, which killed it."""
    done = 0

    def counted(real: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                half(*arguments, **keywords)
                raise Killed
            return real(*arguments, **keywords)

        return call

    with patch.context() as inner:
        for owner, name, half in STEPS:
            inner.setattr(owner, name, counted(getattr(owner, name), half))
        try:
            run()
        except Killed:
            return True
    return False


def digests(out: Path) -> dict[str, str]:
    files = [p for folder in ("shards", "ledger") for p in sorted((out / folder).rglob("*"))]
    found = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return found | {"croissant": str(json.loads((out / "croissant.json").read_text())["distribution"])}


@pytest.mark.parametrize("overwritten", [False, True])
def test_killed_at_every_step_and_run_again_gives_the_same_bytes(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: bool
) -> None:
    """`overwritten`: in a folder that holds a finished run with another seed, at every step of emptying it too."""
    in_this_process(monkeypatch)
    config, other = parse_config(RECIPE), parse_config({**RECIPE, "seed": 1})
    whole, old = tmp_path / "whole", tmp_path / "old"
    manifest = curate(config, pools=[str(raw)], out=whole)
    assert 0 < manifest["kept"] < manifest["seen"] == 16 and len(list((whole / "shards").glob("*.tar"))) == 3
    expected = digests(whole)
    curate(other, pools=[str(raw)], out=old)
    assert digests(old) != expected

    number, killed = 0, True
    while killed:
        number += 1
        out = tmp_path / str(number)
        if overwritten:
            shutil.copytree(old, out)
        run = partial(curate, config, pools=[str(raw)], out=out, overwrite=overwritten)
        killed = run_until(number, monkeypatch, run)
        assert not (killed and (out / "manifest.json").exists() and number > 1), f"killed at {number}, yet complete"
        again = curate(config, pools=[str(raw)], out=out, overwrite=overwritten and killed)
        assert again["kept"] == manifest["kept"]
        assert digests(out) == expected, f"killed at step {number}"
        assert not list(out.glob(".build-*")), f"killed at step {number}: the markers stay"
        shutil.rmtree(out)
    assert number > 30, "few steps: what counts them is out of date"


def test_a_shard_is_read_for_its_checksum_once(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    read: list[str] = []

    def opened(path: Path, real: Callable[[Path], Any] = croissant.open_shard) -> Any:
        if len(read) == 2 and not (tmp_path / "again").exists():
            raise Killed
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(croissant, "open_shard", opened)
    run = partial(curate, parse_config(RECIPE), pools=[str(raw)], out=tmp_path / "out")
    with pytest.raises(Killed):
        run()
    (tmp_path / "again").touch()
    manifest = run()
    assert sorted(read) == [f"{n:08d}.tar" for n in range(3)] and "checksums" in manifest["phases"]


LIGHT = {
    "signals": {name: {"kind": name} for name in ("text", "language", "image", "fingerprints")},
    "selectors": {
        "language": {"kind": "language", "languages": ["en"]},
        "heavy": {"kind": "fraction", "column": "image_bytes", "fraction": 0.8},
        "copies": {"kind": "exact_duplicates"},
        "near": {"kind": "near_duplicates"},
    },
    "unit_samples": 8,
    "shard_samples": 25,
    "max_error_rate": 0.2,
}


PHASES = ("measure", "select", "build")
SHARDS, EACH = 30, 8


def kept_of(out: Path) -> Counter[str]:
    """By input shard, how many of its samples the ledger keeps."""
    rows = pa.concat_tables([pq.read_table(p) for p in (out / "ledger").iterdir()]).to_pylist()
    return Counter(row["shard"] for row in rows if row["verdict"] == "kept")


def markers(out: Path) -> set[str]:
    return {path.name for path in out.glob(".build-*/done/*")}


def wait_for_moment(out: Path, number: int, draw: random.Random, selecting: float) -> Callable[[], bool]:
    """A moment in measure, select or build, by what is there: most of a short run is the start of Ray."""
    if number % 3 == 0:
        parts = draw.randrange(SHARDS)
        return lambda: sum(1 for _ in out.glob("signals/*/*.parquet")) >= parts and (out / ".identity.json").exists()
    if number % 3 == 1:
        delay, since = draw.uniform(0, selecting), []

        def measured() -> bool:
            if (out / "measure.manifest.json").exists() and not since:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] >= delay

        return measured
    copied = draw.randrange(SHARDS - 3)
    return lambda: (out / "select.manifest.json").exists() and len(markers(out)) >= copied


def killed_in_its_midst(pool: Path, out: Path, there: Callable[[], bool]) -> bool:
    """Start the whole job and kill all of it at that moment; False where it was through before."""
    process = test_pipeline.start(LIGHT, pool, out)
    while process.poll() is None and not there():
        time.sleep(0.001)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    return alive and process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments_and_run_again(tmp_path: Path, ray_here: None) -> None:
    """The whole job, with workers of its own, each time alive and in the midst of a phase; what was finished before
    the kill, a measured part or a copied shard, is not done again."""
    pool, draw = tmp_path / "pool", random.Random(0)
    for shard in range(SHARDS):
        samples = {str(n): sample(n % 200) for n in range(shard * EACH, shard * EACH + EACH)}
        write_tar(pool / f"{shard:05d}.tar", samples)
    config, pools = parse_config(LIGHT), [str(pool)]
    curate(config, pools=pools, out=tmp_path / "expected" / "out", workers=2)
    expected = test_pipeline.digests(tmp_path / "expected" / "out")
    selecting = json.loads((tmp_path / "expected" / "out" / "select.manifest.json").read_text())["wall_s"]
    kept, shards = kept_of(tmp_path / "expected" / "out"), {s.fingerprint: s.path for s in list_shards(pools)}

    real, tries, caught, spared = 0, 0, Counter[str](), Counter[str]()
    while real < 20:
        out = tmp_path / str(tries) / "out"
        tries += 1
        assert tries < 60, f"only {real} kills of {tries} met a job at work"
        if not killed_in_its_midst(pool, out, wait_for_moment(out, real, draw, selecting)):
            shutil.rmtree(out)
            continue
        real += 1
        manifests = {p.name: p.stat().st_mtime_ns for p in out.glob("*manifest.json")}
        parts = {p: p.stat().st_mtime_ns for p in out.glob("signals/*/*.parquet")}
        rows = sum(pq.read_metadata(p).num_rows for p in parts)
        copied = sum(kept[shards[fingerprint]] for fingerprint in markers(out))
        caught[max([*manifests, "nothing"], key=["nothing", *(f"{p}.manifest.json" for p in PHASES)].index)] += 1
        manifest = curate(config, pools=pools, out=out, workers=2)
        assert test_pipeline.digests(out) == expected, f"kill {real}"
        assert manifest["seen"] == SHARDS * EACH and not list(out.glob(".build-*"))
        assert {p: p.stat().st_mtime_ns for p in parts} == parts, "finished parts were measured again"
        if "measure.manifest.json" not in manifests:
            assert json.loads((out / "measure.manifest.json").read_text())["measured"] <= SHARDS * EACH - rows
            spared["parts"] += len(parts)
        if "build.manifest.json" not in manifests:
            again = json.loads((out / "build.manifest.json").read_text())["copied"]
            assert again <= kept.total() - copied, "shards that were copied are copied again"
            spared["copied"] += copied
        assert {n: (out / n).stat().st_mtime_ns for n in manifests} == manifests, "a finished phase was done again"
        shutil.rmtree(out)
    assert all(caught[where] >= 4 for where in ("nothing", "measure.manifest.json", "select.manifest.json")), caught
    assert spared["parts"] > 2 * SHARDS and spared["copied"] > kept.total(), (
        f"hardly any work was done before: {spared}"
    )
