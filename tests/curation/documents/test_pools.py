"""Which files a pool of documents is made of: what lies beside pages, links, folders of one name, empty files."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from curation import files
from curation.documents import pipeline
from curation.documents.config import parse_config
from curation.documents.pictures import Limits, image_item
from curation.documents.pipeline import documents
from curation.errors import UserError
from curation.workers import Workers
from tests.curation.conftest import picture, write_tar
from tests.curation.documents.conftest import PROSE
from tests.curation.documents.test_documents import built, check, obelics, rows
from tests.curation.test_kill import here


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)


def page_of(text: str, *pictures: str) -> bytes:
    return (f"<p>{text}</p>" + "".join(f"<img src={name}>" for name in pictures)).encode()


def images(out: Path) -> dict[str, str | None]:
    return {row["src"]: row["reason"] for row in rows(out, "items") if row["kind"] == "image"}


def test_a_picture_that_changes_before_the_build(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = shutil.copytree(pages, tmp_path / "pool")
    build = pipeline._build

    def late(run: pipeline.Run) -> object:
        (pool / "walks.example" / "photo5.jpg").write_bytes(picture(9, (320, 240)))
        return build(run)

    monkeypatch.setattr(pipeline, "_build", late)
    with pytest.raises(UserError, match=r"photo5\.jpg has changed"):
        documents(obelics(), pools=[str(pool)], out=tmp_path / "out")
    with pytest.raises(UserError, match="different pool"):
        documents(obelics(), pools=[str(pool)], out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["html", "jsonl"])
def test_what_comes_beside_a_document_is_looked_for_again(
    kind: str, tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    """A picture that was missing and is there now, and a json that says where another is."""
    pool, raw = tmp_path / "pool", {"document": {"min_images": 0}}
    pool.mkdir()
    if kind == "html":
        (pool / "a.html").write_bytes(page_of(PROSE[0], "late.jpg", "http://x.example/elsewhere.jpg"))
    else:
        raw = {"assign": {"clip": {"model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}}}
        (pool / "a.jsonl").write_text(json.dumps({"text_list": PROSE, "image_info": [{"image_name": "late.jpg"}]}))
    documents(parse_config(raw), pools=[str(pool)], out=tmp_path / "out")
    assert set(images(tmp_path / "out").values()) == {"image_missing"}
    (pool / "late.jpg").write_bytes(picture(1))
    with pytest.raises(UserError, match="different pool"):
        documents(parse_config(raw), pools=[str(pool)], out=tmp_path / "out")
    documents(parse_config(raw), pools=[str(pool)], out=tmp_path / "out", overwrite=True)
    assert images(tmp_path / "out")["late.jpg"] is None
    if kind == "html":
        (pool / "other.jpg").write_bytes(picture(2))
        (pool / "a.json").write_text(json.dumps({"images": {"http://x.example/elsewhere.jpg": "other.jpg"}}))
        documents(parse_config(raw), pools=[str(pool)], out=tmp_path / "out", overwrite=True)
        assert set(images(tmp_path / "out").values()) == {None}


def test_no_page_below_a_link_goes_uncounted(tmp_path: Path) -> None:
    """A folder of the pool under two names is read once; pages that lie elsewhere are errors, as linked files are."""
    pool, elsewhere = tmp_path / "pool", tmp_path / "elsewhere"
    for n, folder in enumerate((pool / "site", elsewhere)):
        folder.mkdir(parents=True)
        (folder / "a.html").write_bytes(page_of(PROSE[n], "a.jpg"))
        (folder / "a.jpg").write_bytes(picture(n))
    (pool / "again").symlink_to(pool / "site")
    (pool / "out").symlink_to(elsewhere)
    (pool / "b.html").symlink_to(elsewhere / "a.html")
    out = tmp_path / "made"
    made = documents(parse_config({}), pools=[str(pool)], out=out)
    check(out, made)
    assert made["kept"] == 1 and made["errors"] == {"unsafe_path": 2}
    both = documents(parse_config({}), pools=[str(pool / "site"), str(elsewhere)], out=tmp_path / "both")
    assert both["kept"] == 2 and not both["errors"]


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(folder: str, *, deep: bool = False) -> None:
        raise PermissionError(13, "Permission denied", f"{folder}/private")

    monkeypatch.setattr(files, "listed", refusing)
    with pytest.raises(UserError, match=r"--pool .*Permission denied.*private.*mend it or take it out"):
        documents(parse_config({}), pools=[str(tmp_path)], out=tmp_path / "out")


def test_folders_of_one_name_in_two_pools_are_two_domains(tmp_path: Path) -> None:
    """What is said once in each repeats in neither."""
    for n, pool in enumerate(("one", "two")):
        (tmp_path / pool).mkdir()
        (tmp_path / pool / "a.html").write_bytes(page_of(f"{PROSE[0]}</p><p>Of page {n}.", "a.jpg"))
        (tmp_path / pool / "a.jpg").write_bytes(picture(n))
    config = parse_config({"pool": {"repeated_paragraphs": True}})
    made = documents(config, pools=[str(tmp_path / p) for p in ("one", "two")], out=tmp_path / "out")
    assert made["items"]["text"] == {"seen": 4, "kept": 4, "dropped": {}, "errors": {}}
    shutil.copytree(tmp_path / "two", tmp_path / "one" / "below")
    shutil.copy(tmp_path / "one" / "a.html", tmp_path / "one" / "b.html")
    (tmp_path / "one" / "b.html").write_bytes(page_of(f"{PROSE[0]}</p><p>Of page 3.", "a.jpg"))
    made = documents(config, pools=[str(tmp_path / "one")], out=tmp_path / "same")
    assert made["items"]["text"]["dropped"]["paragraph_repeated"] == 2


def test_no_member_of_a_tar_goes_uncounted(tmp_path: Path) -> None:
    """A stray and a page that is a link are errors as in pools of pairs; a picture that is a link is not at hand."""
    pool = tmp_path / "pool"
    made = {"a": {"html": page_of(PROSE[0], "p.jpg", "q.jpg"), "p.jpg": picture(1)}}
    path = write_tar(pool / "0.tar", made)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        tar.addfile(tarfile.TarInfo("._a.html"))
        for name in ("a.q.jpg", "b.html"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "a.p.jpg"
            tar.addfile(link)
    said = documents(parse_config({}), pools=[str(pool)], out=tmp_path / "out")
    check(tmp_path / "out", said)
    assert (said["kept"], said["errors"]) == (1, {"not_a_file": 1, "stray_member": 1})
    assert images(tmp_path / "out") == {"p.jpg": None, "q.jpg": "image_missing"}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ("YWI=", b"ab"),
        ("YWI", b"ab"),
        ("YW Jj\n", b"abc"),
        ("YWI%3D", b"ab"),
        ("Y", None),
        ("YW-_", None),
        ("YWI==", None),
    ],
)
def test_bytes_in_an_address_as_browsers_take_them(payload: str, expected: bytes | None) -> None:
    limits = Limits(html_bytes=9, image_bytes=9, items=9, sentences=False)
    item = image_item("", "", f"data:image/png;base64,{payload}", limits)
    assert (item.inline, item.error) == (expected, None if expected else "image_data")


def test_empty_files_beside_one_document(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    write_tar(pool / "0.tar", {})
    (pool / "1.jsonl").write_bytes(b"\n \n")
    (pool / "2.jsonl").write_bytes(b"")
    write_tar(pool / "3.tar", {"a": {"html": page_of(PROSE[0], "p.jpg"), "p.jpg": picture(1)}})
    made = documents(parse_config({}), pools=[str(pool)], out=tmp_path / "out")
    check(tmp_path / "out", made)
    assert made["kept"] == len(built(tmp_path / "out")) == 1
