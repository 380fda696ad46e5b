"""The dataset cards, read by huggingface_hub and by Croissant's own reader; nothing of this machine is in them."""

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import mlcroissant
import pytest
import yaml
from huggingface_hub import DatasetCard

from curation.card import cell, size_category, write_cards
from curation.config import parse_config
from curation.croissant import digest, recorded
from curation.pipeline import curate
from tests.curation.conftest import sample, write_tar


def members_of(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return found


def test_the_hub_reads_it(done: Path) -> None:
    manifest = json.loads((done / "manifest.json").read_text())
    card = DatasetCard.load(done / "README.md")
    front = card.data.to_dict()
    assert front["license"] == "unknown" and front["size_categories"] == ["n<1K"] and front["language"] == ["en"]
    assert set(front["task_categories"]) == {"image-to-text", "text-to-image"}
    path = front["configs"][0]["data_files"][0]["path"]
    assert sorted(done.glob(path)) == sorted((done / "shards").glob("*.tar"))
    columns = {feature["name"]: feature["dtype"] for feature in front["dataset_info"]["features"]}
    extensions = {name.partition(".")[2] for name in members_of(done)}
    assert {e: columns[e] for e in extensions & {"jpg", "png", "txt"}} == {
        e: {"jpg": "image", "png": "image", "txt": "string"}[e] for e in extensions & {"jpg", "png", "txt"}
    }
    rows = [line.split("|") for line in card.text.splitlines() if line.startswith("|")]
    funnel = {row[1].strip().replace("\\", ""): [int(x) for x in row[3:6]] for row in rows[2:9]}
    assert funnel == {s["name"]: [s["in"], s["dropped"], s["out"]] for s in manifest["stages"]}
    score = next(s for s in manifest["stages"] if s["name"] == "score")
    assert f"clip\\_score at {score['thresholds']['clip_score'][0]:.6g}" in card.text
    assert f"ray {manifest['versions']['ray']}" in card.text
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["selectors"]["score"]["fraction"] == 0.8
    assert recipe["signals"]["clip_score"]["pretrained"] == "weights.pt"


def test_croissants_own_reader_gives_every_member(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path))
    dataset = mlcroissant.Dataset(done / "croissant.json")
    assert not dataset.metadata.issues.errors and "not standard" not in caplog.text
    members = members_of(done)
    text = {e: {k.rpartition(".")[0]: v for k, v in members.items() if k.endswith(e)} for e in (".txt", ".json")}
    for records, extension in (("caption", ".txt"), ("json", ".json")):
        found = list(dataset.records(records))
        assert {r[f"{records}/key"].decode(): r[f"{records}/{records}"] for r in found} == text[extension]
        uids = Counter(r[f"{records}/uid"].decode() for r in found)
        assert uids == Counter(key.rpartition("-")[0] for key in text[extension])
    pictures = {r["image/key"].decode(): r["image/image"].size for r in dataset.records("image")}
    assert set(pictures) == set(text[".txt"]) and set(pictures.values()) == {(96, 80)}


def test_checksums_and_the_properties_that_the_specification_demands(done: Path) -> None:
    said = json.loads((done / "croissant.json").read_text())
    assert said["conformsTo"] == "http://mlcommons.org/croissant/1.0" and said["@type"] == "sc:Dataset"
    tars = [d for d in said["distribution"] if d["@type"] == "cr:FileObject"]
    assert len(tars) == len(list((done / "shards").glob("*.tar"))) > 1
    for tar in tars:
        data = (done / tar["contentUrl"]).read_bytes()
        assert (tar["sha256"], tar["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")
    assert {r["name"]: [f["name"] for f in r["field"]] for r in said["recordSet"]} == {
        name: ["key", "uid", name] for name in ("image", "caption", "json")
    }


def test_no_path_time_or_name_of_this_machine(done: Path, pool: Path, tiny_clip: tuple[Path, Path]) -> None:
    manifest = json.loads((done / "manifest.json").read_text())
    both = (done / "README.md").read_text() + (done / "croissant.json").read_text()
    for path in (pool, done, *tiny_clip):
        assert str(path.parent) not in both
    assert f"{pool.name} (4 shards)" in both
    assert str(manifest["phases"]["measure"]["wall_s"]) not in both


def test_the_order_of_digests_and_a_second_writing_change_nothing(done: Path, tmp_path: Path) -> None:
    before = [(done / name).read_bytes() for name in ("README.md", "croissant.json")]
    manifest = json.loads((done / "manifest.json").read_text())
    summary = json.loads((done / "report" / "summary.json").read_text())
    paths = sorted((done / "shards").glob("*.tar"), reverse=True)
    for path in paths:
        digest(tmp_path, path)
    write_cards(done, manifest, summary, [tar for path in paths if (tar := recorded(tmp_path, path.name))])
    assert [(done / name).read_bytes() for name in ("README.md", "croissant.json")] == before


def test_names_from_a_recipe_or_pool_do_not_break_the_card(tmp_path: Path, ray_here: None) -> None:
    pool = tmp_path / "po|ol\n<script>"
    write_tar(pool / "0.tar", {str(n): sample(n) for n in range(3)})
    selectors = {"a | b\n# <b>": {"kind": "threshold", "column": "caption_chars", "min": 1}}
    config = parse_config({"signals": {"text": {"kind": "text"}}, "selectors": selectors})
    curate(config, pools=[str(pool)], out=tmp_path / "out", workers=1)
    text = DatasetCard.load(tmp_path / "out" / "README.md").text.partition("## Recipe")[0]
    rows = [line for line in text.splitlines() if "threshold |" in line]
    assert rows == ["| a \\| b \\# &lt;b> | threshold | 3 | 0 | 3 | caption\\_chars at 1 |"]
    assert "<script>" not in text and "<b>" not in text
    assert not mlcroissant.Dataset(tmp_path / "out" / "croissant.json").metadata.issues.errors


def test_where_nothing_is_kept(tmp_path: Path, ray_here: None) -> None:
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(3)})
    selectors = {"none": {"kind": "threshold", "column": "caption_chars", "min": 1000}}
    config = parse_config({"signals": {"text": {"kind": "text"}}, "selectors": selectors})
    curate(config, pools=[str(tmp_path / "pool")], out=tmp_path / "out", workers=1)
    assert DatasetCard.load(tmp_path / "out" / "README.md").data.to_dict()["size_categories"] == ["n<1K"]
    assert not mlcroissant.Dataset(tmp_path / "out" / "croissant.json").metadata.issues.errors


def test_words_for_sizes_and_cells() -> None:
    sizes = {0: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 99_999: "10K<n<100K", 1_280_000: "1M<n<10M"}
    sizes |= {12_800_000_000: "10B<n<100B", 10**12: "n>1T"}
    assert {n: size_category(n) for n in sizes} == sizes
    assert cell("a|b\nc <i> *x* & `y`") == "a\\|b c &lt;i> \\*x\\* &amp; \\`y\\`"
