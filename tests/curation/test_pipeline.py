"""The whole of `curate`: conservation, determinism, resume, slices, sharing of signals, and what it refuses."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import shuffle
from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.selection import engine
from curation.workers import Workers
from jobs.cli import COMMANDS
from tests.conftest import ROOT
from tests.curation.conftest import picture, sample, write_tar

EXPECTED_ERRORS = {
    "caption_missing": 1,
    "caption_not_utf8": 1,
    "image_decode": 1,
    "image_missing": 1,
    "json_parse": 1,
}


def ledger(out: Path) -> list[dict[str, object]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def digests(out: Path) -> dict[str, str]:
    """Everything that curation makes except timings: signals, ledger, shards, cards and what the page is drawn from."""
    folders = [out / "shards", out / "ledger", *(d for d in (out / "signals").glob("*/") if d.name != "shards")]
    files = [p for folder in folders for p in sorted(folder.iterdir())]
    files += [out / "README.md", out / "croissant.json", out / "report" / "summary.json"]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_conservation_and_reasons(done: Path) -> None:
    manifest = json.loads((done / "manifest.json").read_text())
    rows = ledger(done)
    assert manifest["errors"] == EXPECTED_ERRORS
    assert manifest["seen"] == len(rows) == 140
    assert manifest["seen"] == manifest["kept"] + sum(manifest["dropped"].values()) + sum(manifest["errors"].values())
    assert len({(r["shard"], r["key"]) for r in rows}) == 140
    assert Counter(r["verdict"] for r in rows)["kept"] == manifest["kept"] > 20
    assert Counter(r["reason"] for r in rows if r["verdict"] == "dropped") == manifest["dropped"]
    by_key = {r["key"]: r for r in rows}
    assert by_key["000000128"]["reason"] == "language"
    # Language models have no opinion to rely on about a file name; that the rules name it is what matters.
    assert "caption_rules" in by_key["000000132"]["failed"]  # type: ignore[operator]
    assert by_key["000000122"]["verdict"] == "error" and by_key["000000122"]["reason"] == "image_decode"
    for row in rows:
        assert (row["copies"] == 1) == (row["verdict"] == "kept") == (row["reason"] is None)
        if row["verdict"] == "dropped":
            assert row["reason"] == row["failed"][0]  # type: ignore[index]
    assert (done / "report" / "index.html").is_file()


def test_a_second_run_does_nothing_and_says_so(
    done: Path, pool: Path, recipe: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    manifest = curate(parse_config(recipe), pools=[str(pool)], out=done)
    assert "already complete" in capsys.readouterr().out
    assert manifest == json.loads((done / "manifest.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*")}


def test_one_worker_gives_the_same_bytes_as_two(
    done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object]
) -> None:
    curate(parse_config(recipe), pools=[str(pool)], out=tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == digests(done)


def test_partitions_on_ray_and_buckets_change_nothing(
    done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pool of millions does: partitions of a part or two, each round over them on Ray, many small buckets."""
    cut = engine.partitions
    monkeypatch.setattr(engine, "partitions", lambda parts: cut(parts, rows=20))
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1_000)
    rounds = []
    spread = Workers.map

    def watched(self: Workers, setup: object, items: Sequence[object]) -> Iterator[object]:
        rounds.append(type(setup).__name__)
        return spread(self, setup, items)  # type: ignore[arg-type]

    monkeypatch.setattr(Workers, "map", watched)
    curate(parse_config(recipe), pools=[str(pool)], out=tmp_path / "out", workers=2)
    assert rounds.count("_Bundled") > 20
    assert digests(tmp_path / "out") == digests(done)


def test_slices_in_any_order_then_the_merge(done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object]) -> None:
    config, out = parse_config(recipe), tmp_path / "out"
    for part in ("3/3", "1/3"):
        curate(config, pools=[str(pool)], out=out, phase="measure", part=part, workers=1)
    with pytest.raises(UserError, match="not measured"):
        curate(config, pools=[str(pool)], out=out, phase="select")
    curate(config, pools=[str(pool)], out=out, phase="measure", part="2/3", workers=1)
    assert curate(config, pools=[str(pool)], out=out, phase="measure")["measured"] == 0
    curate(config, pools=[str(pool)], out=out, phase="select")
    for part in ("2/2", "1/2"):
        assert curate(config, pools=[str(pool)], out=out, phase="build", part=part, workers=1)["copied"] > 0
    merged = curate(config, pools=[str(pool)], out=out, workers=1)
    assert json.loads((out / "build.manifest.json").read_text())["copied"] == 0
    assert merged["kept"] == json.loads((done / "manifest.json").read_text())["kept"]
    assert digests(out) == digests(done)


def test_another_recipe_selects_over_the_same_signals(
    done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object]
) -> None:
    other = parse_config({**recipe, "selectors": {"long": {"kind": "threshold", "column": "caption_chars", "min": 50}}})
    manifest = curate(other, pools=[str(pool)], out=tmp_path / "a", phase="select", signals=done / "signals")
    assert manifest["kept"] + manifest["dropped"]["long"] == 135
    # Fewer signals: the set that has more serves as it is.
    fewer = parse_config({**recipe, "signals": {"text": {"kind": "text"}}, "selectors": other_selectors()})
    assert curate(fewer, pools=[str(pool)], out=tmp_path / "b", phase="select", signals=done / "signals")["kept"]


def other_selectors() -> dict[str, object]:
    return {"long": {"kind": "threshold", "column": "caption_chars", "min": 50}}


def test_a_grown_pool_and_one_more_signal_measure_only_what_is_new(
    tmp_path: Path, recipe: dict[str, object], ray_here: None
) -> None:
    folder, store = tmp_path / "pool", tmp_path / "signals"
    write_tar(folder / "0.tar", {str(n): sample(n) for n in range(20)})
    signals = {"text": {"kind": "text"}, "image": {"kind": "image"}}
    first = parse_config({"signals": signals})
    assert curate(first, pools=[str(folder)], out=tmp_path / "a", signals=store, workers=1)["kept"] == 20
    write_tar(folder / "1.tar", {str(n): sample(n) for n in range(30, 37)})
    curate(first, pools=[str(folder)], out=tmp_path / "b", signals=store, workers=1)
    assert measured(tmp_path / "b") == 7
    more = parse_config({"signals": {**signals, "fingerprints": {"kind": "fingerprints"}}})
    curate(more, pools=[str(folder)], out=tmp_path / "c", signals=store, workers=1)
    assert measured(tmp_path / "c") == 27
    whole = parse_config({"signals": {**signals, "fingerprints": {"kind": "fingerprints"}}})
    curate(whole, pools=[str(folder)], out=tmp_path / "d", workers=1)
    for name in ("b", "c", "d"):
        assert json.loads((tmp_path / name / "manifest.json").read_text())["kept"] == 27
    tables = [read_signals(tmp_path / name) for name in ("c", "d")]
    assert tables[0].equals(tables[1])


def measured(out: Path) -> int:
    return json.loads((out / "measure.manifest.json").read_text())["measured"]


def read_signals(out: Path) -> pa.Table:
    manifest = json.loads((out / "measure.manifest.json").read_text())
    return pa.concat_tables([pq.read_table(out / manifest["signal_set"] / p) for p in manifest["parts"]])


def test_a_truncated_tar_is_one_row_and_the_run_goes_on(tmp_path: Path, ray_here: None) -> None:
    folder = tmp_path / "pool"
    path = write_tar(folder / "0.tar", {str(n): sample(n) for n in range(10)})
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size * 6 // 10)
    write_tar(folder / "1.tar", {str(n): sample(n) for n in range(10, 20)})
    (folder / "2.tar").write_bytes(b"")  # as a download leaves it that was killed
    (folder / "3.tar").write_bytes(b"not a tar at all, but long enough to look into" * 20)
    write_tar(folder / "4.tar", {})
    config = parse_config({"max_error_rate": 0.5, "unit_samples": 4})
    manifest = curate(config, pools=[str(folder)], out=tmp_path / "out", workers=1)
    assert manifest["errors"]["truncated_tar"] == 3
    rows = ledger(tmp_path / "out")
    damaged = {Path(str(r["shard"])).name: r["reason"] for r in rows if r["key"] == ""}
    assert damaged == {f"{n}.tar": "truncated_tar" for n in (0, 2, 3)}, "an empty tar that has its end is whole"
    assert sum(str(r["shard"]).endswith("1.tar") and r["verdict"] == "kept" for r in rows) == 10
    assert 14 < manifest["kept"] < 18


def test_too_many_errors_stop_the_run_and_a_higher_budget_goes_on(tmp_path: Path, ray_here: None) -> None:
    broken = {f"b{n}": {"txt": b"a caption without its picture"} for n in range(110)}
    write_tar(tmp_path / "pool" / "0.tar", {**broken, **{str(n): sample(n) for n in range(10)}})
    pools, out = [str(tmp_path / "pool")], tmp_path / "out"
    with pytest.raises(UserError, match=r"max_error_rate: 110 of 120 .*image_missing 110.*raise max_error_rate"):
        curate(parse_config({"max_error_rate": 0.5}), pools=pools, out=out, workers=1)
    write_tar(tmp_path / "one" / "0.tar", {"b": broken["b0"], **{str(n): sample(n) for n in range(10)}})
    with pytest.raises(UserError, match=r"max_error_rate: 1 of 11 .*image_missing 1\), more than 0 of them"):
        curate(parse_config({"max_error_rate": 0}), pools=[str(tmp_path / "one")], out=tmp_path / "strict", workers=1)
    assert not (out / "measure.manifest.json").exists()
    assert curate(parse_config({"max_error_rate": 0.95}), pools=pools, out=out, workers=1)["kept"] == 10


def test_a_small_pool_with_a_fifth_of_it_broken_goes_through_the_shipped_recipe(tmp_path: Path, ray_here: None) -> None:
    def whole(n: int, **members: bytes) -> dict[str, bytes]:
        return sample(n, jpg=picture(n, (260, 220)), **members)

    samples = {str(n): whole(n) for n in range(10, 22)}
    samples["12"]["jpg"] = samples["12"]["jpg"][:500]
    samples["15"]["json"] = b'{"caption": "cut sho'
    samples["18"]["txt"] = "für alle".encode("latin-1")
    write_tar(tmp_path / "pool" / "0.tar", samples)
    path = write_tar(tmp_path / "pool" / "1.tar", {str(n): whole(n) for n in range(30, 38)})
    with tarfile.open(path) as tar:
        last = tar.getmember("37.jpg").offset_data
    os.truncate(path, last + 300)
    words = [
        "--config",
        str(ROOT / "recipes/curate/datacomp_basic.yaml"),
        "--pool",
        str(tmp_path / "pool"),
        "--workers",
        "1",
    ]
    assert COMMANDS["curate"][1]([*words, "--out", str(tmp_path / "out")]) == 0
    rows = ledger(tmp_path / "out")
    assert len(rows) == 20
    assert {(r["key"], r["reason"]) for r in rows if r["verdict"] == "error"} == {
        ("12", "image_decode"),
        ("15", "json_parse"),
        ("18", "caption_not_utf8"),
        ("", "truncated_tar"),
    }
    assert Counter(r["verdict"] for r in rows) == {"kept": 16, "error": 4}


def test_an_edited_list_or_reference_is_another_run(tmp_path: Path, ray_here: None) -> None:
    pools, listed = [str(tmp_path / "pool")], tmp_path / "uids.txt"
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(6)})
    write_tar(tmp_path / "trusted" / "0.tar", {str(n): sample(n) for n in range(3)})
    listed.write_text(f"{1:032x}\n{2:032x}\n")
    quantile = {
        "kind": "reference_quantile",
        "column": "caption_chars",
        "reference": str(tmp_path / "r"),
        "quantile": 0,
    }
    selectors = {"mine": {"kind": "uids", "file": str(listed)}, "trusted": quantile}
    config = parse_config({"signals": {"text": {"kind": "text"}}, "selectors": selectors})
    # The pool may be measured before the reference is, and the reference with the recipe that names it.
    curate(config, pools=pools, out=tmp_path / "out", phase="measure", workers=1)
    for _ in range(2):
        curate(config, pools=[str(tmp_path / "trusted")], out=tmp_path / "r", phase="measure", workers=1)
    assert curate(config, pools=pools, out=tmp_path / "out", workers=1)["kept"] == 2

    listed.write_text(f"{1:032x}\n")
    for phase in ("all", "select", "build"):
        with pytest.raises(UserError, match=r"selectors\.mine reads has changed.*--overwrite"):
            curate(config, pools=pools, out=tmp_path / "out", phase=phase)
    assert curate(config, pools=pools, out=tmp_path / "out", overwrite=True, workers=1)["kept"] == 1
    write_tar(tmp_path / "trusted" / "1.tar", {"7": sample(7)})
    curate(config, pools=[str(tmp_path / "trusted")], out=tmp_path / "r", phase="measure", overwrite=True, workers=1)
    with pytest.raises(UserError, match=r"selectors\.trusted reads has changed"):
        curate(config, pools=pools, out=tmp_path / "out")


def test_a_moved_folder_goes_on(tmp_path: Path, ray_here: None) -> None:
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(6)})
    config, pools = parse_config({"signals": {"text": {"kind": "text"}}}), [str(tmp_path / "pool")]
    curate(config, pools=pools, out=tmp_path / "here", phase="measure", workers=1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert curate(config, pools=pools, out=tmp_path / "there", phase="select")["kept"] == 6


def test_what_is_refused(done: Path, pool: Path, recipe: dict[str, object], tmp_path: Path, ray_here: None) -> None:
    config = parse_config(recipe)
    before = digests(done)
    with pytest.raises(UserError, match="--overwrite"):
        curate(parse_config({**recipe, "seed": 4}), pools=[str(pool)], out=done)
    write_tar(tmp_path / "other" / "0.tar", {"1": sample(1)})
    with pytest.raises(UserError, match=r"different pool.*--overwrite"):
        curate(config, pools=[str(pool), str(tmp_path / "other")], out=done)
    assert digests(done) == before
    with pytest.raises(UserError, match="--phase sort"):
        curate(config, pools=[str(pool)], out=tmp_path / "x", phase="sort")
    for part in ("0/2", "3/2", "half"):
        with pytest.raises(UserError, match="--part"):
            curate(config, pools=[str(pool)], out=tmp_path / "x", phase="measure", part=part)
    with pytest.raises(UserError, match="--part"):
        curate(config, pools=[str(pool)], out=tmp_path / "x", part="1/2")
    with pytest.raises(UserError, match="--workers"):
        curate(config, pools=[str(pool)], out=tmp_path / "x", workers=0)
    with pytest.raises(UserError, match="--phase select"):
        curate(config, pools=[str(pool)], out=tmp_path / "y", phase="build")
    write_tar(tmp_path / "none" / "0.tar", {})
    with pytest.raises(UserError, match="no samples"):
        curate(config, pools=[str(tmp_path / "none")], out=tmp_path / "z", workers=1)


def test_models_that_are_not_there(pool: Path, tmp_path: Path, tiny_clip: tuple[Path, Path], ray_here: None) -> None:
    def clip(model: object, pretrained: object):
        return parse_config({"signals": {"s": {"kind": "clip", "model": str(model), "pretrained": str(pretrained)}}})

    with pytest.raises(UserError, match=r"weights\.pt: no such file"):
        curate(clip(tiny_clip[0], tmp_path / "weights.pt"), pools=[str(pool)], out=tmp_path / "a")
    with pytest.raises(UserError, match="unknown to open_clip"):
        clip("ViT-Z-99", "openai")
    with pytest.raises(UserError, match="cannot load the weights"):
        curate(clip("ViT-B-32", tiny_clip[1]), pools=[str(pool)], out=tmp_path / "b", workers=1)


def test_overrides_change_a_setting_and_no_unknown_one() -> None:
    changed = load_config(ROOT / "recipes/curate/datacomp_basic.yaml", ["--selectors.words.min", "5", "--seed=2"])
    assert changed.to_dict()["selectors"]["words"]["min"] == 5 and changed.seed == 2
    with pytest.raises(UserError, match=r"selectors\.words\.minn"):
        load_config(ROOT / "recipes/curate/datacomp_basic.yaml", ["--selectors.words.minn", "5"])


DRIVER = """
import json, sys
from pathlib import Path
from curation.config import parse_config
from curation.pipeline import curate
recipe, pool, out = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
curate(parse_config(recipe), pools=[pool], out=out, workers=2)
"""


def start(recipe: dict[str, object], pool: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DRIVER, json.dumps(recipe), str(pool), str(out)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_midway_and_run_again_gives_the_same_bytes(
    done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object]
) -> None:
    out = tmp_path / "out"
    process = start(recipe, pool, out)
    wait_for(lambda: len(list(out.glob("signals/*/*.parquet"))) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {p: p.stat().st_mtime_ns for p in out.glob("signals/*/*.parquet")}
    assert not (out / "manifest.json").exists()
    curate(parse_config(recipe), pools=[str(pool)], out=out, workers=2)
    assert {p: p.stat().st_mtime_ns for p in there} == there, "finished parts were measured again"
    assert digests(out) == digests(done)


def test_a_killed_worker_does_not_stop_the_run(
    done: Path, tmp_path: Path, pool: Path, recipe: dict[str, object]
) -> None:
    import psutil

    out = tmp_path / "out"
    process = start(recipe, pool, out)
    wait_for(lambda: list(out.glob("signals/*/*.parquet")), process)
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.name().startswith("ray::_Actor") or any("_Actor" in word for word in p.cmdline()[:1])
    ]
    assert workers
    workers[0].kill()
    assert process.wait(timeout=600) == 0
    assert digests(out) == digests(done)
