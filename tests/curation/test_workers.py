"""How many workers curation takes when it is not told, and that their number and the shards' order change no byte."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from curation import workers as workers_module
from curation.errors import UserError
from curation.workers import Workers, _processors, alive, gpu_shares, progress
from tests.conftest import ROOT
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_pipeline import digests


def test_no_more_than_the_processors_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _processors() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert _processors() == len(before)


def test_on_a_cluster_no_more_than_what_is_free_and_the_same_for_every_map(ray_here: None) -> None:
    import ray

    class Holding:
        def ready(self) -> bool:
            return True

    holding = ray.remote(num_cpus=1)(Holding).remote()
    try:
        ray.get(holding.ready.remote())
        free_cpus(1)
        with Workers(None, None) as workers:
            for _ in range(2):
                assert sorted(workers.map(lambda: abs, [-1, 2, -3])) == [1, 2, 3]
                assert len(workers._actors) == 1
    finally:
        ray.kill(holding)


def test_workers_that_find_no_cpu_are_not_waited_for(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers_module, "SILENT_SECONDS", 0.3)
    free_cpus(2)

    def slow(value: int) -> int:
        time.sleep(0.3)
        return abs(value)

    with Workers(4, None) as workers:
        for items in (range(-6, 0), [-1], range(-6, 0)):  # the second map has a worker that has started
            capsys.readouterr()
            assert sorted(workers.map(lambda: slow, items)) == sorted(map(abs, items))
        assert [actor.start is None for actor in workers._actors] == [True, True, False, False]
    assert "workers: 2 of 4 have started; the others wait for CPUs" in capsys.readouterr().err


def test_workers_that_start_later_get_items_too(ray_here: None) -> None:
    """As where a cluster grows."""
    import ray

    class Holding:
        def ready(self) -> bool:
            return True

    free_cpus(2)
    holding = ray.remote(num_cpus=1)(Holding).remote()
    ray.get(holding.ready.remote())
    seen: list[int] = []
    with Workers(2, None) as workers:
        for process in workers.map(lambda: lambda _: (time.sleep(0.02), os.getpid())[1], range(30_000)):
            seen.append(process)
            if len(seen) == 1:
                ray.kill(holding)  # another has room now
            if len(set(seen)) == 2:
                break
    assert len(set(seen)) == 2


def free_cpus(wanted: int) -> None:
    """Wait until the actors of other tests have gone."""
    import ray

    end = time.monotonic() + 120
    while ray.available_resources().get("CPU", 0) != wanted and time.monotonic() < end:
        time.sleep(0.1)


DRIVER = """
import json, random, sys
from pathlib import Path
from curation.config import parse_config
from curation.pipeline import curate
from curation.selection import engine
from curation.workers import Workers

workers, recipe, pools, out = int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
real, cut = Workers.map, engine.partitions

def shuffled(self, setup, items):
    return real(self, setup, random.Random(workers).sample(list(items), len(items)) if workers > 1 else items)

if workers > 1:  # what a pool of millions has: partitions, in which selection goes over Ray
    engine.partitions = lambda parts: cut(parts, rows=2_100 // workers)
if len(sys.argv) > 5:  # selection hands its parts out by number, so they may go in any order too
    Workers.map = shuffled
curate(parse_config(recipe), pools=pools, out=out, workers=workers)
"""
RECIPE = {
    "signals": {name: {"kind": name} for name in ("text", "language", "image", "exposure", "fingerprints")},
    "selectors": {
        "language": {"kind": "language", "languages": ["en"], "min_probability": 0.3},
        "bright": {"kind": "fraction", "column": "luminance", "fraction": 0.9, "mode": "exact"},
        "score": {"kind": "fraction", "column": "clip_score", "fraction": 0.95},
        "concepts": {"kind": "concept_balance", "t": 3000},
        "balance": {"kind": "cluster_balance", "clusters": 20, "cap_quantile": 0.8},
        "copies": {"kind": "exact_duplicates"},
        "near": {"kind": "near_duplicates", "distance": 2},
        "semantic": {"kind": "semantic_duplicates", "clusters": 7, "eps": 1e-3, "mode": "greedy"},
    },
    "unit_samples": 100,
    "shard_samples": 300,
}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_same_bytes_for_1_2_and_4_workers_and_any_order_of_shards(
    tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    """10,000 pictures in two folders, with copies and ties, through every selector that sees the whole pool; every run
    has a Ray of its own."""
    pictures = [picture(n, (24, 16)) for n in range(2_000)]
    for shard in range(8):
        rows = range(shard * 1250, shard * 1250 + 1250)
        samples = {str(n): sample(n, jpg=pictures[n * 7919 % 2_000]) for n in rows}
        for n in range(rows.start, rows.stop, 11):
            samples[str(n)]["txt"] = "ein kleiner Hund läuft über die grüne Wiese".encode()
        write_tar(tmp_path / "ab"[shard % 2] / f"{shard}.tar", samples)
    entries = ["picture", "the thing", "table", *map(str, range(0, 10_000, 9))]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    concepts = {"kind": "concepts", "metadata": str(tmp_path / "metadata.json")}
    recipe = {**RECIPE, "signals": {**RECIPE["signals"], "clip_score": clip, "concepts": concepts}}
    pools = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = []
    for workers, order, more in ((1, pools, []), (2, pools[::-1], ["shuffled"]), (4, pools, ["shuffled"])):
        out = tmp_path / str(workers) / "out"
        words = [str(workers), json.dumps(recipe), json.dumps(order), str(out), *more]
        subprocess.run([sys.executable, "-c", DRIVER, *words], cwd=ROOT, check=True)
        found.append(digests(out))
    manifest = json.loads((tmp_path / "1" / "out" / "manifest.json").read_text())
    assert manifest["seen"] == 10_000 and manifest["kept"] > 500
    assert set(RECIPE["selectors"]) - {"near"} <= set(manifest["dropped"]), "a selector had nothing to do"
    assert found[0] == found[1] == found[2]


def test_a_log_is_not_silent_while_one_thing_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers_module, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(workers_module, "REPORT_SECONDS", 1e9)
    said: list[str] = []
    monkeypatch.setattr(workers_module._log, "say", lambda text: (said.append(text), print(text, file=sys.stderr)))

    def slow() -> Iterator[int]:
        yield 1
        end = time.monotonic() + 60
        while not any(line.startswith("train") for line in said) and time.monotonic() < end:
            time.sleep(0.01)
        yield 2

    with alive("start"):
        assert list(progress(slow(), label="train", total=2, unit="steps", amount=lambda _: 1, brief=True)) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train: still at work, ")
    assert all(": still at work, " in line for line in lines), "and a short end is no news"
    time.sleep(0.3)
    assert not capsys.readouterr().err, "nothing after the end"


def test_progress_says_each_few_seconds_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers_module, "REPORT_SECONDS", 0.0)
    for brief, expected in ((False, [1, 2, 3]), (True, [1, 2, 3])):
        assert list(progress(range(3), label="it", total=3, unit="steps", amount=lambda _: 1, brief=brief)) == [0, 1, 2]
        said = capsys.readouterr().err.splitlines()
        assert [line.split(" steps")[0] for line in said] == [f"it: {n} of 3" for n in expected]


@pytest.mark.parametrize("failure", [ConnectionError("no running Ray"), RuntimeError("Version mismatch:\n Ray 2.9")])
def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """As `ray.init` fails without a head, and at one of another version."""
    import ray

    def init(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        Workers(1, "head:6379") as workers,
        pytest.raises(
            UserError, match=r"^--ray\.address head:6379: cannot be joined \((no runn|Version mismatch: Ray)"
        ),
    ):
        list(workers.map(lambda: abs, [1]))


def test_workers_that_want_a_gpu_have_a_share_of_one_and_the_others_none(ray_here: None) -> None:
    def seen() -> tuple[list[int], str]:
        import ray

        return ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    class Plain:
        gpu = False

        def __call__(self) -> Callable[[int], tuple[list[int], str]]:
            return lambda _: seen()

    class Wanting(Plain):
        gpu = True

    with Workers(2, None) as workers:
        for setup, expected in ((Plain(), ([], "")), (Wanting(), ([0], "0")), (Plain(), ([], ""))):
            assert list(workers.map(setup, range(6))) == [expected] * 6
            assert workers._share == (0.5 if setup.gpu else 0.0) and len(workers._actors) == 2


@pytest.mark.parametrize(
    ("machines", "count", "found"),
    [
        ([(16, 1)], 16, (4, 0.25)),
        ([(16, 1)], 3, (3, 0.3333)),
        ([(16, 8)], 8, (8, 1.0)),
        ([(64, 0), (16, 8), (8, 4)], 88, (24, 0.5)),  # what has no GPU beside it stays idle
        ([(2, 8), (64, 1)], 66, (6, 0.25)),
        ([(1, 1)], 1, (1, 1.0)),
    ],
)
def test_no_more_workers_than_find_a_gpu_and_a_processor(
    machines: list[tuple[float, float]], count: int, found: tuple[int, float]
) -> None:
    assert gpu_shares(machines, count) == found


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match=r"device: cuda, but no machine of this Ray has a GPU; .*device: cpu"):
        gpu_shares([(64, 0), (0, 8)], 64)
