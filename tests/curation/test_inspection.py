"""`gemsmith inspect` against the ledger and the tars themselves, the page where the pool has changed, and what is there
when signals were there already."""

import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import parse_config
from curation.errors import UserError
from curation.inspection import as_text, inspect
from curation.manifest import read_manifest
from curation.phases import recorded_parts
from curation.pipeline import curate
from curation.report import write_report
from curation.share import share
from curation.sources.folder import forget_names
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_kill import in_this_process


def ledger(out: Path) -> list[dict[str, object]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def test_every_sample_is_told_as_the_ledger_and_the_shards_have_it(done: Path) -> None:
    lying = {}
    for path in sorted((done / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".png")):
                    content = tar.extractfile(member)
                    assert content is not None
                    lying[path.name, member.name.rpartition(".")[0]] = content.read()
    found = {}
    for row in ledger(done):
        for told in inspect(str(row["uid"]), done):
            found[told["shard"], told["key"]] = told
    assert len(found) == 140
    for row in ledger(done):
        told = found[row["shard"], row["key"]]
        assert (told["verdict"], told["reason"]) == (row["verdict"], row["reason"])
        assert [s["name"] for s in told["selectors"] if s["passes"] is False] == row["failed"]
        assert len(told["went"]) == row["copies"]
        for place in told["went"]:
            assert told["picture"].read_bytes() == lying.pop((place["shard"], place["key"]))
    assert not lying


def test_a_selector_that_sees_survivors_alone_was_not_asked_of_what_was_out(done: Path) -> None:
    told = next(t for row in ledger(done) if row["reason"] == "language" for t in inspect(str(row["uid"]), done))
    said = {s["name"]: s["passes"] for s in told["selectors"]}
    assert said["language"] is False and said["copies"] is None and said["score"] is not None
    text = as_text(told)
    assert "dropped by language" in text and "not asked" in text and "nowhere" in text


def test_what_is_not_there_is_one_line(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inspect nobody: not among the 140"):
        inspect("nobody", done)
    with pytest.raises(UserError, match="holds no selection"):
        inspect("nobody", tmp_path)


def test_a_key_may_be_longer_than_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    key = "folder/" * 20 + "x" * 200
    for n in range(2):
        for extension, payload in sample(n, json=b'{"uid": "the_same"}').items():
            path = tmp_path / "pool" / f"{key}{n}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
    config = parse_config({"signals": {"text": {"kind": "text"}}})
    curate(config, pools=[str(tmp_path / "pool")], out=tmp_path / "out")
    told = inspect("the_same", tmp_path / "out")
    assert [Path(one["picture"]).read_bytes() for one in told] == [sample(n)["jpg"] for n in range(2)]


def as_files(pool: Path) -> None:
    for n in range(4):
        for extension, payload in sample(n).items():
            (pool / f"{n}.{extension}").write_bytes(payload)


def as_list(pool: Path) -> None:
    for n in range(4):
        (pool / f"{n}.jpg").write_bytes(picture(n))
    rows = "".join(f"{n}.jpg,a caption with number {n},{n:032x}\n" for n in range(4))
    (pool / "metadata.csv").write_text("file_name,text,uid\n" + rows)


def as_tar(pool: Path) -> None:
    write_tar(pool / "0.tar", {str(n): sample(n) for n in range(4)})


def laid(layout: Callable[[Path], None], pool: Path) -> None:
    """The same files, as old as ever."""
    shutil.rmtree(pool, ignore_errors=True)
    pool.mkdir()
    layout(pool)
    for path in pool.iterdir():
        os.utime(path, ns=(0, 7))


def at_the_end(pool: Path) -> None:
    if (table := pool / "metadata.csv").exists():
        table.write_text(table.read_text() + "more.jpg,one more,more\n")
    (pool / "more.jpg").write_bytes(picture(9))


def before(pool: Path) -> None:
    if (table := pool / "metadata.csv").exists():
        table.write_text(table.read_text().replace("uid\n", "uid\nmore.jpg,one more,more\n"))
    (pool / "00.jpg").write_bytes(picture(9))
    (pool / "00.txt").write_bytes(b"one more")


def in_its_place(pool: Path) -> None:
    """Another picture of as many bytes, or as many in a tar."""
    path = next(path for path in (pool / "2.jpg", pool / "0.tar") if path.exists())
    path.write_bytes(path.read_bytes().replace(picture(2), picture(9).ljust(len(picture(2)), b"\0")[: len(picture(2))]))
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("layout", [as_files, as_list, as_tar])
def test_a_pool_that_changed_shows_the_right_picture_or_says_so(
    layout: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    pool, out = tmp_path / "pool", tmp_path / "out"
    laid(layout, pool)
    curate(parse_config({"signals": {"text": {"kind": "text"}}}), pools=[str(pool)], out=out)

    manifest, parts = read_manifest(out / "manifest.json"), recorded_parts(out)
    summary = read_manifest(out / "report" / "summary.json")
    assert manifest and summary and parts

    def on_page() -> list[str]:
        forget_names()
        return re.findall('src="data:[^"]*"', write_report(out, manifest, parts, {}, summary).read_text())

    on_page_then = on_page()
    assert len(set(on_page_then)) == 4

    def shown() -> tuple[bytes | None, str | None]:
        forget_names()  # as another process knows none
        (told,) = inspect(f"{2:032x}", out)
        path = told["picture"]
        assert f"picture  {path or 'none: '}" in as_text(told)
        assert on_page() == (on_page_then if path else [])
        return path and path.read_bytes(), told["no_picture"]

    assert shown() == (picture(2), None)
    at_the_end(pool)
    assert shown() == (picture(2), None)
    laid(layout, pool)
    assert shown() == (picture(2), None)
    for change in (before, in_its_place):
        if layout is as_tar and change is before:
            continue  # a file beside the tar is no part of it
        laid(layout, pool)
        change(pool)
        found, why = shown()
        assert found is None and why is not None and str(pool) in why
        assert "has changed since it was measured" in why and "put it back" in why
    shutil.rmtree(pool)
    found, why = shown()
    assert found is None and why is not None and str(pool) in why and "\n" not in why


def test_what_each_selector_inside_a_union_says_is_what_it_says_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    scores = [0.5, 0.25, 0.5, 0.5, 0.125, 0.75, 1.0, 0.5, 0.0, 0.375, 0.5, 0.25]
    told = {str(n): json.dumps({"uid": f"{n:032x}", "score": score}).encode() for n, score in enumerate(scores)}
    write_tar(tmp_path / "pool" / "0.tar", {key: sample(int(key), json=said) for key, said in told.items()})
    (tmp_path / "keep.txt").write_text("".join(f"{n:032x}\n" for n in (4, 5, 8)))
    inner = {
        "listed": {"kind": "uids", "file": str(tmp_path / "keep.txt")},
        "half": {"kind": "fraction", "column": "score", "fraction": 0.5, "mode": "exact"},  # which cuts the ties at 0.5
        "fused": {"kind": "score_fusion", "weights": {"score": 1.0, "caption_chars": 0.25}, "fraction": 0.25},
        "low": {"kind": "threshold", "column": "score", "max": 0.6},
        "rules": {"kind": "caption_rules", "min_words": 3},
    }
    both = {name: inner[name] for name in ("half", "low", "rules")}
    joined = {name: inner[name] for name in ("listed", "fused")}
    union = {"kind": "any_of", "selectors": {**joined, "both": {"kind": "all_of", "selectors": both}}}
    signals = {"text": {"kind": "text"}, "f": {"kind": "fields", "fields": {"score": "float32"}}}

    def run(name: str, selectors: dict[str, object]) -> Path:
        config = parse_config({"signals": signals, "selectors": selectors})
        curate(config, pools=[str(tmp_path / "pool")], out=tmp_path / name, signals=tmp_path / "signals")
        return tmp_path / name

    alone = {name: {row["uid"]: not row["failed"] for row in ledger(run(name, {name: inner[name]}))} for name in inner}
    out, recorded = run("out", {"union": union}), Counter[bool]()
    (tmp_path / "keep.txt").unlink()
    for uid in alone["low"]:
        (found,) = inspect(str(uid), out)
        (whole,) = found["selectors"]
        listed, fused, all_of = whole["selectors"]
        assert {one["name"]: one["passes"] for one in (fused, *all_of["selectors"])} == {
            name: alone[name][uid] for name in ("fused", *both)
        }
        assert all_of["passes"] == all(alone[name][uid] for name in both)
        recorded[listed["passes"] is not None] += 1
        assert listed["passes"] in (alone["listed"][uid], None)
        assert listed["passes"] is not None or fused["passes"] or all_of["passes"], "it follows from the others"
        lines = as_text(found).partition("\nverdict  ")[2].splitlines()[1:8]
        names = ["  union", "    listed", "    fused", "    both", *(f"      {name}" for name in both)]
        assert [line[:28].rstrip() for line in lines] == names
        assert ("not recorded" in lines[1]) == (listed["passes"] is None)
    assert recorded[True] and recorded[False]


def test_what_is_selected_over_signals_that_are_there_is_inspected_shared_and_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    pool, store = str(write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(8)})), tmp_path / "store"

    def run(out: str, least: int, **more: Any) -> dict[str, Any]:
        selectors = {"long": {"kind": "threshold", "column": "caption_chars", "min": least}}
        config = parse_config({"signals": {"text": {"kind": "text"}}, "selectors": selectors})
        return curate(config, pools=[pool], out=tmp_path / out, **more)

    run("first", 0, signals=store)
    run("own", 0)
    for out, more in (("new", {"signals": store}), ("own", {"overwrite": True})):
        assert run(out, 40, phase="select", **more)["kept"] == 8
        (told,) = inspect(f"{3:032x}", tmp_path / out)
        assert (told["verdict"], told["signals"]["caption_chars"]) == ("kept", len(sample(3)["txt"]))
        assert share(tmp_path / out, tmp_path / f"{out}-shared", "datacomp") == 8
    run("new", 40, phase="build", part="1/1", signals=store)
    assert run("new", 40, phase="build", signals=store)["kept"] == 8
    (tmp_path / "own" / "measure.manifest.json").unlink()  # as it was left before select wrote one
    assert run("own", 40, phase="build")["kept"] == 8
    for out in ("first", "new", "own"):
        assert {"manifest.json", "README.md", "croissant.json"} <= {path.name for path in (tmp_path / out).iterdir()}
    run("named", 0, signals=tmp_path / "named" / "a" / "store")  # in OUT, but not where it is unless named
    (part,) = (tmp_path / "named" / "a" / "store").glob("*/*.parquet")
    for _ in range(2):
        again = {"overwrite": True, "signals": tmp_path / "named" / "a" / "store"}
        assert run("named", 40, phase="select", **again)["kept"] == 8 and part.exists()
    for inside in ("", "shards", "report/signals"):
        with pytest.raises(UserError, match=r"is where --out .* has its own files; name another folder"):
            run("named", 40, signals=tmp_path / "named" / inside)
    with pytest.raises(UserError, match="not measured there with this recipe's signals; run --phase measure"):
        run("none", 40, phase="select")
