"""Pools of documents behind a URL: what comes out is what comes out of the same files here."""

import errno
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from curation import files
from curation.documents import pipeline
from curation.documents.config import DocumentsConfig
from curation.documents.pictures import inside
from curation.documents.pipeline import documents
from curation.errors import UserError
from curation.workers import Workers
from tests.curation.documents.test_documents import built, mmc4, obelics, rows
from tests.curation.test_kill import here

NAMED_BY_THE_POOL = ("shard", "path", "fingerprint")


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of one process."""
    monkeypatch.setattr(Workers, "map", here)


def outcome(out: Path) -> tuple[Any, ...]:
    """Every verdict on documents, texts and pictures, without where the pool lies, and every byte of the shards."""
    tables = []
    for name in ("ledger", "items"):
        found = [{k: v for k, v in row.items() if k not in NAMED_BY_THE_POOL} for row in rows(out, name)]
        tables.append(sorted(found, key=repr))
    return (*tables, {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.tar"))})


def same_from_memory(folder: Path, config: DocumentsConfig, tmp_path: Path) -> int:
    fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}/pool", recursive=True)
    for name, pool in (("here", str(folder)), ("there", f"memory://{tmp_path.name}/pool")):
        documents(config, pools=[pool], out=tmp_path / name)
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there")
    return len(built(tmp_path / "there"))


def test_pages_with_their_pictures(pages: Path, tmp_path: Path) -> None:
    assert same_from_memory(pages, obelics(), tmp_path) > 5


def test_tars_and_lines(sentence_pool: Path, tiny_clip: tuple[Path, Path], tmp_path: Path) -> None:
    assert same_from_memory(sentence_pool, mmc4(tiny_clip), tmp_path) > 5


def test_a_picture_that_changes_between_the_phases_and_a_pool_that_is_not_there(pages: Path, tmp_path: Path) -> None:
    memory, config = fsspec.filesystem("memory"), obelics()
    memory.put(str(pages), f"/{tmp_path.name}/pool", recursive=True)
    pool, out = f"memory://{tmp_path.name}/pool", tmp_path / "out"
    build = pipeline._build

    def late(run: pipeline.Run) -> Any:
        memory.pipe_file(f"/{tmp_path.name}/pool/walks.example/photo5.jpg", b"another")
        return build(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"photo5\.jpg has changed"):
        patch.setattr(pipeline, "_build", late)
        documents(config, pools=[pool], out=out)
    with pytest.raises(UserError, match="different pool"):
        documents(config, pools=[pool], out=out)
    with pytest.raises(UserError, match=r"nowhere: holds no \.tar"):
        documents(config, pools=[f"memory://{tmp_path.name}/nowhere"], out=tmp_path / "x")


def test_no_address_leads_out_of_a_pool() -> None:
    root = "s3://bucket/pool"
    expected = {
        "x.jpg": f"{root}/a/b/x.jpg",
        "../x.jpg": f"{root}/a/x.jpg",
        "/x.jpg": f"{root}/x.jpg",
        "../../../x.jpg": None,
        "/../x": None,
    }
    assert {name: inside(root, f"{root}/a/b", name) for name in expected} == expected
    for name in ("x::file:///etc/passwd", "%2E%2e/%2e%2e/x.jpg", "x?y=1", "a\nb", "x" * 2_000, "\udcff.jpg"):
        with pytest.raises((OSError, ValueError)):
            inside(root, f"{root}/a/b", name)


def test_what_cannot_be_opened_is_counted(
    sentence_pool: Path, pages: Path, tiny_clip: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar and a list that are links to nowhere, and one picture that may not be read."""
    pool = shutil.copytree(sentence_pool, tmp_path / "pool")
    sound = documents(mmc4(tiny_clip), pools=[str(pool)], out=tmp_path / "sound")
    for name in ("9.tar", "9.jsonl"):
        (pool / name).symlink_to("nowhere")
    made = documents(mmc4(tiny_clip), pools=[str(pool)], out=tmp_path / "out")
    assert made["errors"] == {**sound["errors"], "unreadable": 2} and made["kept"] == sound["kept"] > 0
    (pool / "9.tar").unlink()
    shutil.copy(pool / "1.tar", pool / "9.tar")  # mended, it is looked into
    assert documents(mmc4(tiny_clip), pools=[str(pool)], out=tmp_path / "mended")["errors"]["unreadable"] == 1
    real = files.fetched

    def forbidding(path: str) -> Any:
        if path.endswith("photo5.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(files, "fetched", forbidding)
    documents(obelics(), pools=[str(pages)], out=tmp_path / "pages")
    (row,) = (row for row in rows(tmp_path / "pages", "items") if row["src"] == "photo5.jpg")
    assert row["reason"] == "image_unreadable"
