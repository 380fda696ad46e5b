"""`documents` end to end: verdicts of real-looking pages, the same bytes on any workers, kills, changed pools."""

import dataclasses
import hashlib
import json
import re
import resource
import shutil
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from curation.documents.config import (
    AssignRules,
    DocumentRules,
    DocumentsConfig,
    PoolRules,
    load_config,
    parse_config,
)
from curation.documents.filters import ImageRules, ListFiles, TextRules
from curation.documents.pipeline import documents, funnel
from curation.errors import UserError
from curation.workers import Workers
from tests.conftest import ROOT, gemsmith
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.documents.conftest import PROSE, page
from tests.curation.test_kill import here, run_until

OBELICS = ROOT / "recipes/documents/obelics.yaml"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)


def obelics(**overrides: object) -> DocumentsConfig:
    words = [f"--{name.replace('__', '.')}={json.dumps(value)}" for name, value in overrides.items()]
    return load_config(OBELICS, ["--unit_documents=4", "--shard_documents=5", *words])


def mmc4(tiny_clip: tuple[Path, Path], **overrides: object) -> DocumentsConfig:
    clip = {"model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    return parse_config({"assign": {"clip": clip}, "images": {"min_side": 150}, "shard_documents": 4, **overrides})


def rows(out: Path, table: str) -> list[dict[str, Any]]:
    return [row for path in sorted((out / table).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def built(out: Path) -> dict[str, dict[str, Any]]:
    """Every document of the shards as webdataset reads it, by its uid."""
    urls = [str(path) for path in sorted((out / "shards").glob("*.tar"))]
    return {found["__key__"]: found for found in webdataset.WebDataset(urls, shardshuffle=False)} if urls else {}


def digests(out: Path) -> dict[str, str]:
    files = [p for folder in ("shards", "ledger", "items") for p in sorted((out / folder).iterdir())]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def check(out: Path, manifest: dict[str, Any]) -> None:
    """What holds for every output: nothing lost, nothing both kept and dropped, lists as long as each other."""
    ledger, items, found = rows(out, "ledger"), rows(out, "items"), built(out)
    assert len(ledger) == manifest["seen"]
    counts = Counter(row["verdict"] for row in ledger)
    assert counts["kept"] == manifest["kept"] == len(found)
    assert counts["dropped"] == sum(manifest["dropped"].values()) and counts["error"] == sum(
        manifest["errors"].values()
    )
    assert {row["uid"] for row in ledger if row["verdict"] == "kept"} == set(found)
    for kind in ("text", "image"):
        of_kind = [row for row in items if row["kind"] == kind]
        said = manifest["items"][kind]
        assert said["seen"] == len(of_kind) == said["kept"] + sum(said["dropped"].values())
        assert all((row["verdict"] == "kept") == (row["reason"] is None) for row in of_kind)
    members = 0
    for document in found.values():
        said = json.loads(document["json"])
        assert len(said["texts"]) == len(said["images"]) == len(said["metadata"])
        for text, image, meta in zip(said["texts"], said["images"], said["metadata"], strict=True):
            assert (text is None) != (image is None) and (image is None) == (meta is None)
            if image is not None:
                assert hashlib.sha256(document[image]).hexdigest() == meta["sha256"]
                members += 1
    assert members == manifest["items"]["image"]["kept"] == sum(row["images"] for row in ledger)
    sizes = json.loads((out / "shards" / "sizes.json").read_text())
    assert sum(sizes.values()) == len(found)
    assert [s["nsamples"] for s in json.loads((out / "shards" / "index.json").read_text())["shardlist"]] == list(
        sizes.values()
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pages: Path, ray_here: None) -> Path:
    out = tmp_path_factory.mktemp("documents") / "out"
    check(out, documents(obelics(), pools=[str(pages)], out=out, workers=2))
    return out


def test_pages_by_obelics_rules(done: Path, pages: Path) -> None:
    by_key = {row["key"].rpartition("/")[2]: row for row in rows(done, "ledger")}
    kept = {key for key, row in by_key.items() if row["verdict"] == "kept"}
    assert len(kept & {"post03", "post12"}) == 1, "of two equal pages one stays"
    assert kept - {"post03", "post12"} == {"inline", *(f"post{n:02}" for n in range(12) if n != 3)}
    reasons = {key: row["reason"] for key, row in by_key.items() if key not in kept}
    assert reasons.pop("post03", None) or reasons.pop("post12") == "duplicate_document"
    assert reasons == {
        "empty": "document_images",
        "no_pictures": "document_images",
        "outside": "document_images",
        "broken": "document_images",
        "german": "document_texts",
        "latin": "document_texts",
    }
    of_post = [row for row in rows(done, "items") if row["uid"] == by_key["post00"]["uid"]]
    assert [(row["kind"], row["reason"]) for row in of_post] == [
        ("text", None),
        ("text", None),
        ("image", None),
        ("text", "paragraph_repeated"),
        ("text", "paragraph_character_repetition"),
        ("image", "image_url"),
        ("image", "image_small"),
        ("text", "paragraph_repeated"),
        ("text", "paragraph_words"),
        ("text", "paragraph_repeated"),
    ]
    dropped = {row["src"]: row["reason"] for row in rows(done, "items") if row["kind"] == "image" and row["reason"]}
    assert dropped["../../../../etc/passwd"] == "unsafe_path" and dropped["photo99.jpg"] == "image_decode"


def test_a_kept_page(done: Path, pages: Path) -> None:
    (row,) = (row for row in rows(done, "ledger") if row["key"].endswith("post05"))
    document = built(done)[row["uid"]]
    said = json.loads(document["json"])
    title, walk = said["texts"][0].split("\n\n")
    assert title == "A walk of the kind that we like, number 5" and walk.startswith(PROSE[5])
    assert said["texts"][1:] == [None] and said["images"] == [None, "0.jpg"]
    assert document["0.jpg"] == (pages / "walks.example" / "photo5.jpg").read_bytes()
    assert said["metadata"][1] | {"sha256": ""} == {
        "src": "photo5.jpg",
        "alt_text": "boats & gulls",
        "rendered_width": "640",
        "rendered_height": "480",
        "original_width": 320,
        "original_height": 240,
        "format": "jpg",
        "sha256": "",
    }


def test_the_same_bytes_on_any_workers_and_nothing_to_do_again(
    done: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents(obelics(), pools=[str(pages)], out=tmp_path / "one", workers=1)
    assert digests(tmp_path / "one") == digests(done)
    before = digests(done)
    documents(obelics(), pools=[str(pages)], out=done)
    assert "already complete" in capsys.readouterr().out and digests(done) == before
    with pytest.raises(UserError, match="different images"):
        documents(obelics(images__min_side=100), pools=[str(pages)], out=done)


def test_another_threshold_opens_no_picture(
    done: Path, pages: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    monkeypatch.setattr("curation.documents.measure.decode", None)
    manifest = documents(
        obelics(images__min_side=50, pool__repeated_paragraphs=False), pools=[str(pages)], out=out, overwrite=True
    )
    check(out, manifest)
    assert manifest["items"]["text"]["dropped"]["paragraph_boilerplate"] == 12
    assert "image_small" not in manifest["items"]["image"]["dropped"]
    assert manifest["items"]["image"]["dropped"]["image_everywhere"] == 13, "the thumbnail is on thirteen pages"


def test_sentences_by_mmc4(
    tiny_clip: tuple[Path, Path], sentence_pool: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    manifest = documents(mmc4(tiny_clip), pools=[str(sentence_pool)], out=out)
    check(out, manifest)
    assert manifest["errors"] == {"json_layout": 1, "json_parse": 2} and manifest["kept"] == 14
    for document in built(out).values():
        said = json.loads(document["json"])
        sentences = [text for text in said["texts"] if text is not None]
        uses = Counter(meta["matched_text_index"] for meta in said["metadata"] if meta)
        if uses.total() <= len(sentences):
            assert max(uses.values()) == 1, "a sentence has at most one picture"
        else:
            assert set(uses) == set(range(len(sentences))), "every sentence has one before any has two"
        following = [i for i, text in enumerate(said["texts"]) if text is not None]
        for i, meta in enumerate(said["metadata"]):
            if meta:  # the picture stands before its sentence
                assert said["texts"][min(j for j in following if j > i)] == sentences[meta["matched_text_index"]]
    monkeypatch.setattr(Workers, "map", lambda self, setup, items: here(self, setup, list(items)[::-1]))
    documents(mmc4(tiny_clip), pools=[str(sentence_pool)], out=tmp_path / "backwards")
    assert digests(tmp_path / "backwards") == digests(out)
    missing = [row for row in rows(out, "items") if row["reason"] == "image_missing"]
    assert [row["src"] for row in missing] == ["none.jpg", "none.jpg"]


def test_the_rules_of_the_core_set(
    tiny_clip: tuple[Path, Path], sentence_pool: Path, tmp_path: Path, in_process: None
) -> None:
    clip = {"clip": {"model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}, "min_similarity": -1.0}
    rules = {"document": {"min_texts": 4, "min_images": 2, "max_images": 4}}
    manifest = documents(mmc4(tiny_clip, **rules), pools=[str(sentence_pool)], out=tmp_path / "a")
    # of 12 documents with 1 to 7 pictures in turn, 3 or more than 4 in 7; the two lines have one picture at hand
    wanted = sum(2 <= 1 + n % 7 <= 4 for n in range(12))
    assert manifest["kept"] == wanted and manifest["dropped"] == {"document_images": 14 - wanted}
    core = {"assign": {**clip, "well_matched": 1.0, "min_well_matched": 0.75}}
    manifest = documents(mmc4(tiny_clip, **core), pools=[str(sentence_pool)], out=tmp_path / "b")
    assert manifest["dropped"] == {"document_matches": 14} and manifest["shards"] == 0
    none = {"assign": {**clip, "min_similarity": 1.0}}
    manifest = documents(mmc4(tiny_clip, **none), pools=[str(sentence_pool)], out=tmp_path / "c")
    assert manifest["dropped"] == {"nothing_left": 14}


def test_pages_of_a_tar_and_what_is_wrong_with_them(tmp_path: Path, in_process: None) -> None:
    text = f"<p>{PROSE[0]}</p><p>{PROSE[1]}</p>"
    both = page("Both", text + "<img src='https://x.example/a/1.jpg?w=9'><img src='https://x.example/b/1.jpg'>")
    mapped = {"url": "https://x.example/", "uid": "mapped", "images": {"https://x.example/b/1.jpg": "two.jpg"}}
    good = {"html": page("One", text + "<img src='/deep/photo.jpg#x'>"), "photo.jpg": picture(1, (200, 200))}
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT5\xaf\x06\x1e"
    found = {
        "good": good,
        "sub/same": good,
        "both": {"html": both, "1.jpg": picture(2, (200, 200))},
        "map": {"html": both, "json": json.dumps(mapped).encode(), "two.jpg": picture(3, (200, 200))},
        "bomb": {"html": page("Bomb", text + "<img src=b.png>"), "b.png": bomb},
        "self": {"html": page("Self", text + "<img src=self.html>")},
        "none": {"jpg": picture(4)},
        "large": {"html": b"<p>" + b"x" * 200_000},
        "json": {"html": good["html"], "json": b"[" * 100_000},
        "../up": good,
    }
    write_tar(tmp_path / "pool" / "0.tar", found)
    whole = write_tar(tmp_path / "pool" / "1.tar", {"cut": {"html": both}}).read_bytes()
    (tmp_path / "pool" / "1.tar").write_bytes(whole[:1000])
    write_tar(tmp_path / "pool" / "2.tar", {"pair": sample(1)})
    config = parse_config({"max_html_bytes": 100_000})
    manifest = documents(config, pools=[str(tmp_path / "pool")], out=tmp_path / "out")
    check(tmp_path / "out", manifest)
    verdicts = {row["key"]: row["reason"] for row in rows(tmp_path / "out", "ledger")}
    assert sorted((verdicts.pop("good"), verdicts.pop("sub/same")), key=str) == [None, "duplicate_document"]
    assert verdicts == {
        "both": "document_images",
        "map": None,
        "bomb": "document_images",
        "self": "document_images",
        "none": "document_missing",
        "large": "html_large",
        "json": "json_parse",
        "../up": "unsafe_name",
        "": "truncated_tar",
        "pair": "json_layout",
    }
    reasons = Counter(row["reason"] for row in rows(tmp_path / "out", "items") if row["kind"] == "image")
    assert reasons == {
        "image_ambiguous": 2,
        "decompression_bomb": 1,
        "image_missing": 2,  # the page as its own picture, and what is not in the list of `map`
        "document_dropped": 1,
        None: 2,
    }


def test_killed_at_every_step_and_run_again(
    pages: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every rename, deletion, write and marker, one after another; half a write too."""
    pool = tmp_path / "pool"
    pool.mkdir()
    for name in ("post00.html", "photo0.jpg", "post01.html", "photo1.jpg", "inline.html"):
        shutil.copy2(pages / "walks.example" / name, pool)
    config = obelics(document__language=None, unit_documents=2, shard_documents=2)
    check(tmp_path / "whole", documents(config, pools=[str(pool)], out=tmp_path / "whole"))
    expected, number, killed = digests(tmp_path / "whole"), 0, True
    while killed:
        number += 1
        out = tmp_path / str(number)
        killed = run_until(number, monkeypatch, partial(documents, config, pools=[str(pool)], out=out))
        check(out, documents(config, pools=[str(pool)], out=out))
        assert digests(out) == expected, f"killed at step {number}"
        assert not list(out.glob(".build-*")) and not list(out.glob(".select-*")), f"killed at step {number}"
        shutil.rmtree(out)
    assert number > 25


def test_the_error_budget(tmp_path: Path, in_process: None) -> None:
    for rate, n in ((0, 1), (0.1, 101)):
        write_tar(tmp_path / "pool" / "0.tar", {str(n): {"txt": b"no document"} for n in range(n)})
        with pytest.raises(UserError, match=rf"{n} of {n} documents cannot be used \(document_missing {n}\)"):
            documents(obelics(max_error_rate=rate), pools=[str(tmp_path / "pool")], out=tmp_path / str(n))
    manifest = documents(obelics(max_error_rate=1), pools=[str(tmp_path / "pool")], out=tmp_path / "101")
    check(tmp_path / "101", manifest)
    assert manifest["errors"] == {"document_missing": 101} and manifest["shards"] == 0


def test_no_room_is_one_line_that_names_the_folder(pages: Path, tmp_path: Path, in_process: None) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"--out .*out: a file grows beyond the limit.*run the same command again"):
            documents(obelics(), pools=[str(pages)], out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert documents(obelics(), pools=[str(pages)], out=tmp_path / "out")["kept"] > 0


def test_a_lost_document_fails_the_run() -> None:
    counts = {
        "document": Counter({("kept", None): 2, ("dropped", "no_text"): 1}),
        "text": Counter(),
        "image": Counter(),
    }
    assert funnel(counts, 3, ["no_text"])["stages"][-1] == {"name": "no_text", "in": 3, "out": 2, "dropped": 1}
    for measured, stages in ((4, ["no_text"]), (3, ["no_image"])):
        with pytest.raises(RuntimeError, match="conservation"):
            funnel(counts, measured, stages)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"imges": {}}, "imges"),
        ({"images": {"min_sid": 3}}, "images.min_sid"),
        ({"images": None}, "images: null"),
        ({"assign": {"clip": {"model": None}}}, "assign.clip.model: null"),
        ({"images": {"min_side": "many"}}, "min_side"),
        ({"assign": {"clip": {"model": "x"}, "place": "beside"}}, "place"),
        ({"unit_documents": 0}, "unit_documents"),
        ({"paragraphs": {"min_common_words": 0.8}}, "lists.common_words"),
        ({"document": {"text": {"max_flagged_words": 0.01}}}, "lists.flagged_words"),
    ],
)
def test_a_bad_recipe_is_one_line(raw: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named) as failure:
        parse_config(raw)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes/documents").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.images.min_side == 150 and (config.assign is None) == (recipe.stem == "obelics")


def test_every_setting_and_reason_is_on_the_page() -> None:
    said = (ROOT / "docs/documents.md").read_text()
    for settings in (DocumentsConfig, ImageRules, TextRules, DocumentRules, PoolRules, AssignRules, ListFiles):
        for field in dataclasses.fields(settings):
            assert f"`{field.name}`" in said, f"{settings.__name__}.{field.name}"
    sources = [path.read_text() for path in (ROOT / "curation/documents").glob("*.py")]
    quoted = set(
        re.findall(r'"((?:image|page|json|html|unsafe|document|duplicate|no|nothing|too)_[a-z_]+)"', "".join(sources))
    )
    reasons = quoted - {"document_url", "image_name", "image_info", "image_format", "document_dropped"}
    assert len(reasons) > 20
    assert {reason for reason in reasons if f"`{reason}`" not in said} == set()


def test_the_example_of_the_page() -> None:
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/documents.md").read_text(), re.DOTALL)
    assert found is not None
    assert parse_config(yaml.safe_load(found[1])).pool.repeated_paragraphs


def test_the_command(tmp_path: Path) -> None:
    refused = gemsmith("documents", "--config", OBELICS, "--pool", tmp_path, "--out", tmp_path / "out", check=False)
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: --pool {tmp_path}: holds no")
