"""What pools hold that nobody plans for: derived texts, captions of a megabyte, control characters, names of folders;
in the cards, the page, `inspect` and `share`."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.budget import check_budget
from curation.config import parse_config
from curation.documents.config import parse_config as parse_documents
from curation.documents.filters import ImageRules, ListFiles, load_lists
from curation.documents.judge import Rules, _settle
from curation.errors import UserError
from curation.inspection import as_text, inspect
from curation.pipeline import curate
from curation.selection.caption_rules import CaptionRules
from curation.selection.cluster_balance import ClusterBalance
from curation.share import share
from curation.workers import Workers
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_kill import here

L14 = "clip_l14_similarity_score"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs with a score of DataComp's and two texts each, one of them with a caption of a megabyte."""
    folder = tmp_path_factory.mktemp("odd")
    samples = {}
    for n in range(12):
        said = {"uid": f"{n:032x}", "url": f"https://x.example/\x1b]0;{n}\x07\u202e", L14: n / 16}
        more = {
            "json": json.dumps(said).encode(),
            "recaption.txt": b"another caption",
            "seg.png": picture(n, kind="PNG"),
        }
        samples[str(n)] = sample(n, **more)
    samples["5"]["txt"] = "\u202ea wörd \x1b[31m".encode() + b"more " * 200_000
    write_tar(folder / "pool" / "0.tar", samples)
    signals = {"text": {"kind": "text"}, "scores": {"kind": "fields", "fields": {L14: "float32"}}}
    selectors = {"best": {"kind": "threshold", "column": L14, "min": 1 / 16}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", here)
        curate(
            parse_config({"signals": signals, "selectors": selectors}), pools=[str(folder / "pool")], out=folder / "out"
        )
    return folder / "out"


def test_croissant_has_no_derived_text_among_the_captions(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path))
    dataset = mlcroissant.Dataset(out / "croissant.json")
    assert not dataset.metadata.issues.errors
    expected = {f"{n:032x}-0" for n in range(1, 12)}
    captions = [(r["caption/key"].decode(), r["caption/caption"]) for r in dataset.records("caption")]
    assert {key for key, _ in captions} == expected and len(captions) == len(expected)
    assert all(b"another caption" not in text for _, text in captions)
    pictures = [r["image/key"].decode() for r in dataset.records("image")]
    assert sorted(pictures) == sorted(expected)


def test_the_terminal_is_shown_text_and_no_commands(out: Path) -> None:
    (told,) = inspect(f"{5:032x}", out)
    text = as_text(told)
    assert all(c.isprintable() or c == "\n" for c in text) and len(text) < 5_000
    assert r"\x1b]0;5\x07\u202e" in text and "1,000,0" in text and "wörd" in text


def test_the_page_holds_what_it_shows(out: Path) -> None:
    page = (out / "report" / "index.html").read_bytes().decode()
    assert "more more" in page and len(page) < 300_000


def test_the_page_is_utf8_whatever_the_locale(out: Path) -> None:
    before = (out / "report" / "index.html").read_bytes()
    code = """if True:
        import json, sys
        from pathlib import Path
        from curation.manifest import read_manifest
        from curation.phases import recorded_parts
        from curation.report import write_report
        out = Path(sys.argv[1])
        said = {name: read_manifest(out / f"{name}.manifest.json") for name in ("measure", "select", "build")}
        summary = read_manifest(out / "report" / "summary.json")
        write_report(out, read_manifest(out / "manifest.json"), recorded_parts(out), said, summary)
    """
    plain = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(out)], env={**os.environ, **plain}, check=True)
    after = (out / "report" / "index.html").read_bytes()
    assert "wörd".encode() in before and "wörd".encode() in after


def test_scores_that_came_with_the_pool_are_datacomps_columns_again(out: Path, tmp_path: Path) -> None:
    assert share(out, tmp_path / "shared", "datacomp") == 12
    (table,) = (pd.read_parquet(path) for path in (tmp_path / "shared").glob("*.parquet"))
    assert table[L14].dtype == np.float32 and table[L14].tolist() == [n / 16 for n in range(12)]


@pytest.mark.parametrize("kind", ["pictures", "csv", "tar"])
def test_the_card_names_the_pool_and_not_where_it_lies(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "map", here)
    pool = tmp_path / "private place" / "holiday"
    pool.mkdir(parents=True)
    (pool / "a.jpg").write_bytes(picture(1))
    (pool / "a.txt").write_text("a picture of a dog")
    if kind == "csv":
        (pool / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    if kind == "tar":
        write_tar(pool / "0.tar", {"0": sample(0)})
    curate(parse_config({"signals": {"text": {"kind": "text"}}}), pools=[str(pool)], out=tmp_path / "out")
    for name in ("README.md", "croissant.json"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "holiday (1 shards)" in text and "private place" not in text


def test_lists_of_words_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes("\ufeffÉté\nfirst\n".encode())
    assert load_lists(ListFiles(stopwords=str(tmp_path / "words.txt"))).stopwords == {"été", "first"}


def test_what_is_just_at_a_bound_is_within_it(tmp_path: Path) -> None:
    """As the numbers are written: the products 4.35 * 200 and 0.28 * 25 are off by a last bit."""
    wide = {"src": "", "image_format": "jpg", "height": 200}
    for width, reason in ((870, None), (871, "image_aspect")):
        assert ImageRules(max_aspect=4.35).reason(width=width, **wide) == reason  # type: ignore[arg-type]
    captions = pa.table({"caption": ["abcdefg" + "1" * 18, "abcdefg" + "1" * 19, ""]})
    rules = CaptionRules(min_letters=0.28, builtin=False, min_words=0, min_chars=0)
    assert rules.apply(captions, None).tolist() == [True, False, True]
    check_budget(Counter({"broken": 4_350}), 10_000, 0.435)
    check_budget(Counter({"broken": 29_000}), 100_000, 0.29)
    with pytest.raises(UserError, match="4351 of 10000"):
        check_budget(Counter({"broken": 4_351}), 10_000, 0.435)


@pytest.mark.parametrize(("good", "reason"), [(7, None), (6, "document_matches")])
def test_a_share_of_matches_that_is_just_reached(good: int, reason: str | None) -> None:
    """0.28 of 25 pictures."""
    clip = {"model": "ViT-B-32", "pretrained": "openai"}
    rules = Rules(parse_documents({"assign": {"clip": clip, "well_matched": 0.5, "min_well_matched": 0.28}}))
    cosines = np.diag([0.75] * good + [0.25] * (25 - good)).astype(np.float32)
    found = [{"text": f"text {n}"} for n in range(25)]
    found += [
        {"text": None, "similarity": cosines[n], "sha256": bytes([n]) * 32, "phash": n * 0x0101_0101} for n in range(25)
    ]
    assert _settle(rules, found, [None] * 50)[0] == reason


@pytest.mark.parametrize(
    ("share_", "rows", "cap"), [(0.07, 100, 7), (0.29, 100, 29), (0.1, 31, 4), (1.0, 9, 9), (1e-9, 5, 1)]
)
def test_a_share_is_the_number_that_is_written(share_: float, rows: int, cap: int) -> None:
    assert ClusterBalance(clusters=2, max_share=share_)._cap(np.array([rows - 1, 1])) == cap


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "captions", "n": 0}, "captions: n 0 is not at least 1"),
        ({"kind": "captions", "top_k": 0}, "captions: top_k 0 is not at least 1"),
        ({"kind": "captions", "top_p": 1.5}, r"captions: top_p 1\.5 is not in"),
        ({"kind": "sieve", "min_tokens": 30}, r"min_tokens 30 is not in 0\.\.20"),
        ({"kind": "recaption", "beams": 0}, "recaption: beams 0 is not at least 1"),
        ({"kind": "recaption", "max_tokens": 0, "min_tokens": 0}, "recaption: max_tokens 0 is not at least 1"),
    ],
)
def test_what_no_captioner_can_be_asked_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"signals": {"said": {"model": "m", **settings}}})


def test_pictures_in_a_dictionary_are_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a table of a picture for each of several captions is written."""
    monkeypatch.setattr(Workers, "map", here)
    images = pa.array([picture(1), picture(2), picture(1)]).dictionary_encode()
    captions = pa.array(["a dog", "a cat", "the same dog"]).dictionary_encode()
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "pool" / "0.parquet")
    made = curate(
        parse_config({"signals": {"image": {"kind": "image"}}}), pools=[str(tmp_path / "pool")], out=tmp_path / "out"
    )
    assert (made["seen"], made["kept"], made["errors"]) == (3, 3, {})


def judge(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"known": item["sha256"][-1] in "02468ace"} for item in items]


def test_signals_that_read_no_caption_are_for_pictures_alone_too(
    tmp_path: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With values as beside captions; and those that read no picture are for texts."""
    monkeypatch.setattr(Workers, "map", here)
    function = f"{__name__}:judge"
    signals = {
        "regions": {"kind": "text_regions"},
        "drawn": {"kind": "captions", "model": str(blip), "n": 2},
        "said": {"kind": "recaption", "model": str(blip)},
        "hashes": {"kind": "service", "function": function, "send": ["uid", "sha256"], "columns": {"known": "bool"}},
    }
    found = []
    for modality, members in (("pairs", {"txt": b"a caption"}), ("images", {})):
        pool, out = tmp_path / modality, tmp_path / f"of {modality}"
        write_tar(pool / "0.tar", {str(n): {"jpg": picture(n), **members} for n in range(4)})
        curate(parse_config({"signals": signals, "modality": modality}), pools=[str(pool)], out=out)
        said = json.loads((out / "measure.manifest.json").read_text())
        table = pq.read_table(out / said["signal_set"] / said["parts"][0])
        found.append(table.select(["text_area", "drawn", "said", "known"]).to_pylist())
    known = [hashlib.sha256(picture(n)).digest()[-1] % 2 == 0 for n in range(4)]
    assert found[0] == found[1] and [row["known"] for row in found[0]] == known
    words = {"kind": "service", "function": function, "send": ["caption"], "columns": {"known": "bool"}}
    parse_config({"signals": {"cat": {"kind": "cat"}, "words": words}, "modality": "texts"})
    for name in ("hashes", "regions", "said"):
        with pytest.raises(UserError, match=f"signals.{name}: reads the image"):
            parse_config({"signals": {name: signals[name]}, "modality": "texts"})
    for signal in (words, {"kind": "sieve", "model": str(blip)}):
        with pytest.raises(UserError, match=r"signals\.x: reads the caption"):
            parse_config({"signals": {"x": signal}, "modality": "images"})
