"""Pools with something wrong in them: counted and named; and pools of pictures or texts alone."""

import errno
import json
import os
import shutil
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import files, pipeline, tar
from curation.config import parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.pool import list_shards
from tests.curation.conftest import picture, sample, with_unheard_values, write_tar
from tests.curation.test_kill import digests, in_this_process, run_until

RECIPE: dict[str, Any] = {
    "signals": {"text": {"kind": "text"}, "fingerprints": {"kind": "fingerprints"}},
    "unit_samples": 4,
    "shard_samples": 5,
    "max_error_rate": 1,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)


def rows(out: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def run(pool: Path | str, out: Path, **recipe: Any) -> dict[str, Any]:
    return curate(parse_config({**RECIPE, **recipe}), pools=[str(pool)], out=out)


def reasons(out: Path) -> Counter[str | None]:
    return Counter(row["reason"] for row in rows(out))


def put(folder: Path, target: str) -> str:
    fs = fsspec.filesystem(target.partition(":")[0])
    fs.put(str(folder), target.partition(":/")[2], recursive=True)
    return target


def pairs(n: int) -> dict[str, dict[str, bytes]]:
    return {f"{i:09d}": sample(i) for i in range(n)}


@pytest.mark.parametrize("layout", ["tar", "parquet", "csv"])
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_a_shard_that_changes_or_goes_between_phases(
    tmp_path: Path, layout: str, remote: bool, fault: str, temporary: Path
) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    if layout == "tar":
        victim = write_tar(folder / "0.tar", pairs(6))
    elif layout == "parquet":
        victim = folder / "0.parquet"
        pq.write_table(pa.table({"image": [picture(n) for n in range(6)], "text": ["words"] * 6}), victim)
    else:
        victim = folder / "0.jpg"
        victim.write_bytes(picture(0))
        (folder / "metadata.csv").write_text("file_name,text\n0.jpg,words\n")
    pool = put(folder, f"memory://{tmp_path.name}") if remote else str(folder)
    config = parse_config(RECIPE)
    for phase in ("measure", "select"):
        curate(config, pools=[pool], out=tmp_path / "out", phase=phase)
    made = list_shards([pool])
    fs, path = fsspec.core.url_to_fs(f"{pool}/{victim.name}")
    if fault == "gone":
        fs.rm(path)
    else:
        fs.pipe_file(path, fs.cat_file(path) + b"more")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="has changed since"):
        patch.setattr(pipeline, "list_shards", lambda *a: made)  # as if it happened after the pool was listed
        curate(config, pools=[pool], out=tmp_path / "out", phase="build")
    assert not (tmp_path / "out" / "shards").exists()


def test_parquet_that_cannot_be_read_at_all_or_in_one_row_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    table = pa.table({"jpg": [picture(n) for n in range(12)], "caption": [f"number {n}" for n in range(12)]})
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    column = pq.read_metadata(folder / "a.parquet").row_group(1).column(0)
    with open(folder / "a.parquet", "r+b") as f:
        f.seek(column.dictionary_page_offset or column.data_page_offset)
        f.write(b"\xff" * 40)
    (folder / "b.parquet").write_bytes(b"no parquet")
    write_tar(folder / "c.tar", pairs(2))
    manifest = run(folder, tmp_path / "out")
    assert (manifest["seen"], manifest["kept"], manifest["errors"]) == (15, 10, {"parquet_damaged": 5})
    found = {(Path(r["shard"]).name, r["key"]) for r in rows(tmp_path / "out") if r["verdict"] == "error"}
    assert found == {("b.parquet", ""), *(("a.parquet", f"{n:09d}") for n in range(4, 8))}
    assert "b.parquet: parquet_damaged: " in capsys.readouterr().err, "the log says which, and of what"


def test_values_that_are_missing_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    raw = pa.array([b"fine", b"bad \xff", None, b"fine"]).view(pa.string())
    images = pa.array([picture(1), picture(2), picture(3), None])
    pq.write_table(pa.table({"image": images, "text": raw, "n": [1.5, None, 2, 3]}), tmp_path / "pool" / "0.parquet")
    run(tmp_path / "pool", tmp_path / "out")
    reason = [row["reason"] for row in rows(tmp_path / "out")]
    assert reason == [None, "caption_not_utf8", "caption_missing", "image_missing"]


def test_lists_with_rows_that_cannot_be_followed(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    (tmp_path / "outside.jpg").write_bytes(picture(1))
    (folder / "in.jpg").write_bytes(picture(2))
    (folder / "notes.txt").write_text("no picture")
    names = [
        "in.jpg",
        "../outside.jpg",
        f"{tmp_path}/outside.jpg",
        "absent.jpg",
        "notes.txt",
        "https://a/b.jpg",
        "./in.jpg",
    ]
    lines = ["file_name,text", *(f"{name},some words" for name in names), "in.jpg,two,commas", "in.jpg"]
    (folder / "metadata.csv").write_bytes("\n".join(lines).encode() + b"\nin.jpg,caf\xe9\n")
    run(folder, tmp_path / "out")
    expected = [None, "unsafe_name", "unsafe_name", "image_missing", "image_unknown_format", "unsafe_name", None]
    assert [r["reason"] for r in rows(tmp_path / "out")] == [
        *expected,
        "list_row_broken",
        "list_row_broken",
        "caption_not_utf8",
    ]
    (folder / "metadata.csv").rename(folder / "kept_away")
    (folder / "captions.jsonl").write_text(
        '{"file_name": "in.jpg", "text": "words"}\n[1]\nnot json\n{"text": "words"}\n'
    )
    run(folder, tmp_path / "lines")
    assert [r["reason"] for r in rows(tmp_path / "lines")] == [
        None,
        "list_row_broken",
        "list_row_broken",
        "image_missing",
    ]


def test_a_list_with_a_field_that_is_too_long_or_that_cannot_be_opened(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / "pool" / folder).mkdir(parents=True)
        (tmp_path / "pool" / folder / "1.jpg").write_bytes(picture(1))
    long = "x" * 200_000  # longer than a field may be
    (tmp_path / "pool" / "a" / "metadata.csv").write_text(f"file_name,text\n1.jpg,words\n1.jpg,{long}\n1.jpg,words\n")
    (tmp_path / "pool" / "b" / "metadata.csv").symlink_to("metadata.csv")  # a link to itself: cannot be opened
    (tmp_path / "pool" / "c" / "metadata.csv").write_text("file_name,text\n1.jpg,words\n")
    run(tmp_path / "pool", tmp_path / "out")
    found = Counter((Path(r["shard"]).parent.name, r["reason"]) for r in rows(tmp_path / "out"))
    assert found == {("a", None): 2, ("a", "list_row_broken"): 1, ("b", "list_unreadable"): 1, ("c", None): 1}
    (tmp_path / "pool" / "c" / "metadata.csv").write_text("some,columns\n1,2\n")
    with pytest.raises(UserError, match=r"metadata\.csv: has neither a column of files .* but 'some, columns'"):
        run(tmp_path / "pool", tmp_path / "x")


def test_files_that_cannot_be_read_are_rows(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        (folder / f"{n}.txt").write_text("words")
    (folder / "1.jpg").unlink()
    (folder / "1.jpg").symlink_to("nowhere.jpg")
    (folder / "2.txt").unlink()
    (folder / "2.txt").symlink_to("2.txt")
    run(folder, tmp_path / "out")
    assert [row["reason"] for row in rows(tmp_path / "out")] == [None, "unreadable", "unreadable"]


def test_a_shard_that_cannot_be_opened_is_a_row_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, store = tmp_path / "pool", {"signals": tmp_path / "store"}
    for n in range(3):
        write_tar(pool / f"{n}.tar", {f"{n}": sample(n)})
    (pool / "3.tar").symlink_to("nowhere.tar")
    pq.write_table(pa.table({"image": [picture(4)], "text": ["words"]}), pool / "4.parquet")
    (pool / "5.parquet").symlink_to("5.parquet")
    real = files.why_closed
    monkeypatch.setattr(files, "why_closed", lambda n: "Permission denied" if n.endswith("/1.tar") else real(n))
    config = parse_config(RECIPE)
    made = curate(config, pools=[str(pool)], out=tmp_path / "out", **store)
    assert (made["seen"], made["kept"], made["errors"]) == (6, 3, {"unreadable": 3})
    found = {Path(row["shard"]).name for row in rows(tmp_path / "out") if row["reason"] == "unreadable"}
    assert found == {"1.tar", "3.tar", "5.parquet"}
    said = capsys.readouterr().err
    assert "1.tar: unreadable: Permission denied" in said and "3.tar: unreadable: No such file" in said
    strict = parse_config({**RECIPE, "max_error_rate": 0})
    with pytest.raises(UserError, match=r"\d of \d+ samples cannot be used \(unreadable \d\)"):
        curate(strict, pools=[str(pool)], out=tmp_path / "strict")
    monkeypatch.undo()
    in_this_process(monkeypatch)
    mended = curate(config, pools=[str(pool)], out=tmp_path / "mended", **store)
    assert (mended["kept"], mended["errors"]) == (4, {"unreadable": 2})
    listed = list_shards([str(pool)])
    (pool / "3.tar").unlink()
    write_tar(pool / "3.tar", {"3": sample(3)})
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"3\.tar has changed since"):
        patch.setattr(pipeline, "list_shards", lambda *a: listed)
        curate(config, pools=[str(pool)], out=tmp_path / "late")


def test_what_is_written_into_the_pool_is_no_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        (folder / f"{n}.json").write_text(json.dumps({"caption": f"words {n}"}))
    run(folder, tmp_path / "beside")
    expected = list_shards([str(folder)])
    config = parse_config(RECIPE)
    inside = {"pools": [str(folder)], "out": folder / "curated", "signals": folder / "measured" / "store"}
    for phase in ("measure", "select", "build", "all"):
        curate(config, **inside, phase=phase)
        assert list_shards([str(folder)]) == expected
    assert digests(folder / "curated") == digests(tmp_path / "beside")
    assert list_shards([str(folder / "curated" / "shards")]), "what is named itself is a pool, whoever made it"


def test_links_to_folders_are_followed_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, other = tmp_path / "pool", tmp_path / "other"
    for where in (pool / "z", other / "deep"):
        where.mkdir(parents=True)
        (where / "1.jpg").write_bytes(picture(1))
    (other / "2.jpg").write_bytes(picture(2))
    (pool / "train").symlink_to(other)
    (pool / "again").symlink_to(other / "deep")  # comes before train/deep
    (pool / "a").symlink_to(pool / "z")
    (pool / "z" / "up").symlink_to(pool)
    (other / "deep" / "loop").symlink_to(other)
    expected = [str(pool / name) for name in ("again/1.jpg", "train/2.jpg", "z/1.jpg")]
    scandir = os.scandir
    for order in (False, True):

        class Entries:
            def __init__(self, path: str, order: bool = order) -> None:
                self.found = sorted(scandir(path), key=lambda entry: entry.name, reverse=order)

            def __enter__(self) -> list[Any]:
                return self.found

            def __exit__(self, *exception: object) -> None:
                pass

        monkeypatch.setattr(files.os, "scandir", Entries)
        assert [file.name for file in files.listed(str(pool), deep=True) or ()] == expected


def test_pools_of_pictures_and_of_texts(tmp_path: Path) -> None:
    pictures, texts, tables = (tmp_path / name for name in ("pictures", "texts", "tables"))
    for folder in (pictures, texts, tables):
        folder.mkdir()
    for n in range(3):
        (pictures / f"{n}.jpg").write_bytes(picture(n))
        (texts / f"{n}.txt").write_text(f"text {n}")
    (pictures / "3.jpg").write_bytes(b"no picture")
    pq.write_table(pa.table({"text": ["one", "two", None]}), tables / "0.parquet")
    images = {"signals": {"f": {"kind": "fingerprints"}, "i": {"kind": "image"}}, "modality": "images"}
    words = {"signals": {"text": {"kind": "text"}}, "modality": "texts"}
    assert run(pictures, tmp_path / "a", **images)["errors"] == {"image_decode": 1}
    assert run(texts, tmp_path / "b", **words)["kept"] == 3
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n{"text": "two", "lang": "en"}\n')
    assert run(tmp_path / "lines.jsonl", tmp_path / "g", **words)["kept"] == 3
    (tmp_path / "twice").mkdir()
    for name in "ab":
        shutil.copy(tmp_path / "lines.jsonl", tmp_path / "twice" / f"{name}.jsonl")
    assert run(tmp_path / "twice", tmp_path / "h", **words)["kept"] == 6
    assert run(tables, tmp_path / "c", **words)["errors"] == {"caption_missing": 1}
    assert run(pictures, tmp_path / "d")["errors"] == {"caption_missing": 4}
    assert run(texts, tmp_path / "e")["errors"] == {"image_missing": 3}
    with pytest.raises(UserError, match=r"0\.parquet: has no column of pictures.*modality: texts"):
        run(tables, tmp_path / "f")
    with pytest.raises(UserError, match=r"signals\.text: reads the caption, which modality images is without"):
        parse_config({**images, "signals": words["signals"]})
    with pytest.raises(UserError, match=r"signals\.f: reads the image, which modality texts is without"):
        parse_config({**words, "signals": images["signals"]})
    with pytest.raises(UserError, match=r"selectors\.rules: column caption is not measured"):
        parse_config({**images, "selectors": {"rules": {"kind": "caption_rules"}}})
    with pytest.raises(UserError, match=r"recipe.*modality"):
        parse_config({"modality": "sounds"})


def test_killed_at_many_steps_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    (tmp_path / "pool").mkdir()
    for shard in range(2):
        texts = [f"picture number {n % 9}" for n in range(9 * shard, 9 * shard + 9)]
        images = [picture(n % 9) for n in range(9 * shard, 9 * shard + 9)]
        pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "pool" / f"{shard}.parquet")
    pool: Any = put(tmp_path / "pool", f"memory://{tmp_path.name}")
    config = parse_config({**RECIPE, "selectors": {"copies": {"kind": "exact_duplicates"}}})
    assert curate(config, pools=[pool], out=tmp_path / "whole")["kept"] == 9
    expected = digests(tmp_path / "whole")
    number, killed = 1, True
    while killed:
        out = tmp_path / str(number)
        killed = run_until(number, monkeypatch, partial(curate, config, pools=[pool], out=out))
        there = {p: p.stat().st_mtime_ns for p in out.glob("signals/*/*.parquet")}
        curate(config, pools=[pool], out=out)
        assert {p: p.stat().st_mtime_ns for p in there} == there, "finished parts were measured again"
        assert digests(out) == expected, f"killed at step {number}"
        shutil.rmtree(out)
        number += 3
    assert number > 20


def test_credentials_and_backends_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pool nosuch://bucket/pool: .*install"):
        list_shards(["nosuch://bucket/pool"])
    with pytest.raises(UserError, match=r"--pool memory://.*nowhere.*no such folder"):
        list_shards(["memory://nowhere/at/all"])
    with pytest.raises(UserError, match=r"--pool .*one\.tar: no such"):
        list_shards([str(tmp_path / "one.tar")])
    path = write_tar(tmp_path / "some" / "one.tar", pairs(1))
    write_tar(tmp_path / "some" / "two.tar", pairs(1))
    assert [shard.path for shard in list_shards([str(path)])] == [str(path)]
    assert files.look(str(tmp_path)) is None


def test_values_that_python_has_not_are_left_out_and_of_two_columns_the_first_counts(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    table = with_unheard_values({"image": [picture(1), picture(2)], "TEXT": ["words"] * 2, "uid": ["aa", "bb"]})
    pq.write_table(table.append_column("image", pa.array([b"not", b"these"])), tmp_path / "pool" / "0.parquet")
    assert run(tmp_path / "pool", tmp_path / "out")["kept"] == 2
    with tarfile.open(next((tmp_path / "out" / "shards").glob("*.tar"))) as tar:
        first, second = (json.loads(tar.extractfile(f"{uid}-0.json").read()) for uid in ("aa", "bb"))  # type: ignore[union-attr]
    assert second == {"caption": "words", "uid": "bb", "score": 2}
    assert first == {
        **{"caption": "words", "uid": "aa", "score": 1, "day": "1970-01-01", "at": "1970-01-01 00:00:00"},
        **{"zoned": "1970-01-01 05:00:00+05:00", "days": ["1970-01-01"]},
    }


def test_the_json_holds_the_other_columns(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    columns = {"URL": "u", "uid": "ab", "width": 7, "score": 0.5, "tags": ["a", "b"], "mask": b"bytes", "none": None}
    columns["missing"] = float("nan")
    table = pa.table({"image": [picture(1)], "TEXT": ["words"], **{k: [v] for k, v in columns.items()}})
    pq.write_table(table, tmp_path / "pool" / "0.parquet")
    run(tmp_path / "pool", tmp_path / "out")
    with tarfile.open(next((tmp_path / "out" / "shards").glob("*.tar"))) as tar:
        said = json.loads(tar.extractfile("ab-0.json").read())  # type: ignore[union-attr]
    expected = {"caption": "words", "url": "u", "uid": "ab", "width": 7, "score": 0.5, "tags": ["a", "b"]}
    assert said == expected


@pytest.mark.parametrize(("member", "kept"), [("000000003.jpg", 8), ("000000003.json", 8), ("header", 6)])
def test_a_disk_that_fails_within_a_shard_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], member: str, kept: int
) -> None:
    """EIO in one member's bytes, or in a header, behind which nothing can be found. (A read fails as the disk's would;
    the copying, of other bytes, does not.)"""
    broken = write_tar(tmp_path / "pool" / "0.tar", pairs(6))
    write_tar(tmp_path / "pool" / "1.tar", {f"{i:09d}": sample(i) for i in range(6, 9)})
    with tarfile.open(broken) as opened:
        found = opened.getmember("000000003.jpg" if member == "header" else member)
    bad = found.offset if member == "header" else found.offset_data
    node, read = broken.stat().st_ino, os.pread

    def pread(descriptor: int, size: int, start: int) -> bytes:
        if os.fstat(descriptor).st_ino == node and start <= bad < start + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(tar, "PAUSES", (0.0, 0.0))
    manifest = run(tmp_path / "pool", tmp_path / "out")
    assert manifest["errors"] == {"unreadable": 1} and manifest["kept"] == kept
    if member == "header":
        assert f"{broken}: unreadable: cannot be read beyond its first 3 samples ([Errno 5]" in capsys.readouterr().err
