"""Members that no loader would see, or that would leave the folder: each is a row of the ledger with its name, the run
goes on, and nothing of them is in the shards."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import phases, pipeline
from curation.config import parse_config
from curation.pipeline import curate
from curation.tar import members, open_shard, padded, samples
from curation.workers import Workers
from tests.curation.conftest import picture, sample
from tests.curation.test_kill import here, nothing

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
DEEP = "deep/" * 30  # 150 bytes: PAX records, GNU's long names, ustar's prefix
UNSAFE = [
    "/etc/passwd.jpg",
    "../up.jpg",
    "a/../../b.jpg",
    f"../{DEEP}x.jpg",
    f"/{DEEP}y.jpg",
    "/no_extension",
    "../../up",
]
STRAY = ["README", "folder/LICENSE", ".DS_Store", "folder/.000000001.jpg"]
LINKS = {"linked.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "pipe.jpg": tarfile.FIFOTYPE}


@pytest.fixture(params=FORMATS)
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One tar of eight sound samples, as macOS's tar puts them there, between which stands everything else."""
    path = tmp_path / "pool" / "0.tar"
    path.parent.mkdir()

    def add(tar: tarfile.TarFile, name: str, payload: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(payload), kind, "/etc/shadow" + "x" * 120 * (kind == tarfile.SYMTYPE)
        if kind in (tarfile.DIRTYPE, *LINKS.values()):
            info.size = 0
        if kind == tarfile.LNKTYPE:
            info.linkname = "000000001.jpg"
        if request.param == "ustar" and kind == tarfile.SYMTYPE:
            info.linkname = "/etc/shadow"
        tar.addfile(info, io.BytesIO(payload))

    with tarfile.open(path, "w", format=FORMATS[request.param]) as tar:
        add(tar, "folder", kind=tarfile.DIRTYPE)
        others = [*UNSAFE, *STRAY]
        for n in range(8):
            for extension, payload in sample(n).items():
                add(tar, f"folder/._{n:09d}.{extension}", b"\0\5\x16\7\0\2\0\0Mac OS X")
                add(tar, f"folder/{n:09d}.{extension}", payload)
            for name in others[n::8]:
                add(tar, name, picture(n))
        for name, kind in LINKS.items():
            add(tar, name, kind=kind)
            add(tar, name.replace("jpg", "txt"), b"a caption of what is not there")
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)
    for module in (phases, pipeline):
        monkeypatch.setattr(module, "write_report", nothing)


def rows(out: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def run(pool: Path, out: Path) -> dict[str, Any]:
    recipe = {"signals": {"text": {"kind": "text"}}, "unit_samples": 5}
    return curate(parse_config(recipe), pools=[str(pool)], out=out)


def test_every_member_is_of_a_row_of_the_ledger(strange: Path, tmp_path: Path, in_process: None) -> None:
    manifest = run(strange.parent, tmp_path / "out")
    found = {row["key"]: row["reason"] for row in rows(tmp_path / "out")}
    with tarfile.open(strange) as tar:
        named = [info.name for info in tar if not info.isdir() and "/._" not in info.name]
    assert all(name in found or name.rpartition(".")[0] in found for name in named), "a member is nowhere"
    assert {key: reason for key, reason in found.items() if reason} == {
        **{name.removesuffix(".jpg"): "unsafe_name" for name in UNSAFE},
        **dict.fromkeys(STRAY, "stray_member"),
        **dict.fromkeys(["linked", "hard", "pipe"], "not_a_file"),
    }
    assert manifest["errors"] == Counter(reason for reason in found.values() if reason)
    assert manifest["seen"] == len(found) == 8 + len(UNSAFE) + len(STRAY) + len(LINKS)
    assert manifest["kept"] == 8


def test_the_shards_unpack_within_their_folder(strange: Path, tmp_path: Path, in_process: None) -> None:
    run(strange.parent, tmp_path / "out")
    for path in (tmp_path / "out" / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {info.name for info in tar} == {f"{n:032x}-0.{e}" for n in range(8) for e in ("jpg", "txt", "json")}
            assert all(info.isreg() for info in tar)


def test_loaders_and_training_see_what_they_always_saw(strange: Path) -> None:
    """webdataset passes over members without key or extension; so does the index that training reads shards by."""
    data = open_shard(strange)
    with tarfile.open(strange) as tar:
        files = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [(m.name, m.offset, m.size) for m in members(data)] == files
    keys = {s.key for s in samples(data)[0]}
    assert not keys & set(STRAY) and {"linked", "hard", "pipe"} < keys  # by their captions


def test_files_of_a_folder_that_are_no_pictures_by_name_are_rows(tmp_path: Path, in_process: None) -> None:
    pool = tmp_path / "pool"
    (pool / "a").mkdir(parents=True)
    for n in range(3):
        (pool / "a" / f"{n}.jpg").write_bytes(picture(n))
        (pool / "a" / f"{n}.txt").write_text("words of a picture")
    (pool / "a" / "0.xmp").write_text("goes with the first picture, which it says something of")
    (pool / "a" / "new.heic").write_bytes(b"a picture that nothing here reads")
    (pool / "NOTES").write_text("of the folder")
    manifest = run(pool, tmp_path / "out")
    assert (manifest["seen"], manifest["kept"], manifest["errors"]) == (5, 3, {"image_unknown_format": 2})
    assert {row["key"] for row in rows(tmp_path / "out") if row["reason"]} == {"a/new.heic", "NOTES"}


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_a_member_of_8_gib_costs_its_sample_alone(form: str, tmp_path: Path, in_process: None) -> None:
    """A ustar header, as the build writes them, has 11 octal digits for its size."""
    path = tmp_path / "pool" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for n in range(4):
            for extension, payload in sample(n).items():
                info = tarfile.TarInfo(f"{n:09d}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
            if n in (1, 2):
                info = tarfile.TarInfo(f"{n:09d}.mp4")
                info.size = 8**11 if n == 1 else 5
                head = info.tobuf(FORMATS[form])
                assert tar.fileobj is not None
                tar.fileobj.write(head)
                tar.fileobj.seek(padded(info.size), io.SEEK_CUR)  # a hole, which takes no room
                tar.offset += len(head) + padded(info.size)
    with tarfile.open(path) as tar:
        assert {info.name: info.size for info in tar if info.name.endswith(".mp4")} == {
            "000000001.mp4": 8**11,
            "000000002.mp4": 5,
        }
    manifest = run(path.parent, tmp_path / "out")
    assert (manifest["kept"], manifest["errors"]) == (3, {"member_too_large": 1})
    assert [row["key"] for row in rows(tmp_path / "out") if row["reason"]] == ["000000001"]
