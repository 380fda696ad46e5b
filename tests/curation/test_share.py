"""What `gemsmith share` writes, read as clip-retrieval's and DataComp's own code read it: by file names, pandas and
NumPy alone; and DataComp's filters, written down once more over those files, keep what ours kept."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from curation import share as sharing
from curation.config import parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.selection import engine
from curation.share import share
from curation.workers import Workers
from jobs.cli import COMMANDS
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_kill import here

L14 = "clip_l14_similarity_score"
IMAGE = "clip_l14_similarity_image_embedding"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    """Ninety pairs in three shards, a third of them copies, and three broken ones; the best 80 % without copies."""
    folder = tmp_path_factory.mktemp("share")
    samples = {f"{n:05d}": sample(n, jpg=picture(n % 60)) for n in range(90)}
    for n in (4, 33, 61):
        samples[f"{n:05d}"]["jpg"] = b"no picture"
    for shard in range(3):
        write_tar(folder / "pool" / f"{shard}.tar", dict(list(samples.items())[shard * 30 : shard * 30 + 30]))
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1]), "text_embedding": True}
    config = parse_config(
        {
            "signals": {L14: clip, "prints": {"kind": "fingerprints"}, "image": {"kind": "image"}},
            "selectors": {
                "best": {"kind": "fraction", "column": L14, "fraction": 0.8},
                "like": {
                    "kind": "semantic_duplicates", "column": IMAGE, "clusters": 2, "eps": 1e-6,
                },
            },
            "unit_samples": 20,
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", here)
        curate(config, pools=[str(folder / "pool")], out=folder / "out")
    return folder / "out"


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "partitions", lambda parts: engine.partitions(parts, rows=30))


def ledger(out: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def test_clip_retrievals_layout(out: Path, tmp_path: Path) -> None:
    kept = {row["uid"] for row in ledger(out) if row["verdict"] == "kept"}
    assert share(out, tmp_path / "index", "clip-retrieval") == len(kept) > 20
    numbers = sorted(p.stem.rpartition("_")[2] for p in (tmp_path / "index" / "metadata").iterdir())
    assert numbers == ["0", "1", "2"]
    found: list[str] = []
    for number in numbers:
        rows = pd.read_parquet(tmp_path / "index" / "metadata" / f"metadata_{number}.parquet")
        image, text = (np.load(tmp_path / "index" / k / f"{k}_{number}.npy") for k in ("img_emb", "text_emb"))
        assert image.dtype == text.dtype == np.float16 and image.shape == text.shape == (len(rows), 64)
        for values in (image, text):
            np.testing.assert_allclose(np.linalg.norm(values.astype(np.float32), axis=1), 1, atol=2e-3)
        scores = (image.astype(np.float32) * text.astype(np.float32)).sum(axis=1)
        np.testing.assert_allclose(scores, rows[L14], atol=2e-3)
        assert rows.columns[0] == "image_path" and {"caption", "url", "uid"} < set(rows.columns)
        found += rows["image_path"].tolist()
    assert sorted(found) == sorted(kept)


def test_datacomps_layout_and_its_filters_over_it(out: Path, tmp_path: Path) -> None:
    """`get_threshold` and the selection by clusters of its apply_filter.py."""
    verdicts = ledger(out)
    readable = [row["uid"] for row in verdicts if row["verdict"] != "error"]
    assert share(out, tmp_path / "metadata", "datacomp") == len(readable) == 87
    parquets = sorted((tmp_path / "metadata").glob("*.parquet"))
    tables = [pd.read_parquet(path) for path in parquets]
    whole = pd.concat(tables)
    assert sorted(whole["uid"]) == sorted(readable)
    assert set(whole.columns) == {"uid", "url", "text", "original_width", "original_height", L14, "sha256"}
    assert whole["text"].str.startswith("a picture").all() and (whole["original_width"] == 96).all()
    assert whole["sha256"].str.fullmatch("[0-9a-f]{64}").all() and whole[L14].dtype == np.float32
    threshold = -np.sort(-whole[L14].values)[int(len(whole) * 0.8)]
    kept = set(whole[whole[L14] >= threshold]["uid"])
    assert kept == {row["uid"] for row in verdicts if row["verdict"] != "error" and "best" not in row["failed"]}
    for path, rows in zip(parquets, tables, strict=True):
        arrays = np.load(path.with_suffix(".npz"))
        assert set(arrays) == {"l14_img", "l14_txt"}
        scores = (arrays["l14_img"].astype(np.float32) * arrays["l14_txt"].astype(np.float32)).sum(axis=1)
        np.testing.assert_allclose(scores, rows[L14], atol=2e-3)


def test_vectors_that_a_signal_did_not_give(out: Path, tmp_path: Path) -> None:
    """Two kept samples without the picture's: clip-retrieval has no row of them, DataComp's arrays a row of NaN."""
    there = tmp_path / "out"
    shutil.copytree(out, there, ignore=shutil.ignore_patterns("shards"))
    missing = [row["uid"] for row in ledger(out) if row["verdict"] == "kept"][7:20:12]
    for path in (there / "signals").rglob("*.parquet"):
        table = pq.read_table(path)
        if IMAGE in table.schema.names:
            holed = pc.if_else(pc.is_in(table["uid"], pa.array(missing)), pa.scalar(None), table[IMAGE])
            place = table.schema.get_field_index(IMAGE)
            pq.write_table(table.set_column(place, table.schema.field(IMAGE), holed), path)
    kept = [row["uid"] for row in ledger(out) if row["verdict"] == "kept"]
    assert share(there, tmp_path / "index", "clip-retrieval") == len(kept) - 2
    for path in sorted((tmp_path / "index" / "metadata").iterdir()):
        rows = pd.read_parquet(path)
        image, text = (np.load(tmp_path / "index" / k / f"{k}_{path.stem[-1]}.npy") for k in ("img_emb", "text_emb"))
        assert not set(missing) & set(rows["uid"])
        np.testing.assert_allclose((image.astype(np.float32) * text).sum(axis=1), rows[L14], atol=2e-3)
    share(there, tmp_path / "metadata", "datacomp")
    for path in (tmp_path / "metadata").glob("*.parquet"):
        rows, arrays = pd.read_parquet(path), np.load(path.with_suffix(".npz"))
        gone = np.isnan(arrays["l14_img"]).all(axis=1)
        assert rows["uid"][gone].tolist() == [uid for uid in rows["uid"] if uid in missing]
        scores = (arrays["l14_img"].astype(np.float32) * arrays["l14_txt"]).sum(axis=1)
        np.testing.assert_allclose(scores[~gone], rows[L14][~gone], atol=2e-3)


def test_semdedups_removals(out: Path, tmp_path: Path) -> None:
    words = ["--out", str(out), "--layout", "semdedup", "--to", str(tmp_path / "removed")]
    assert COMMANDS["share"][1](words) == 0
    found = pq.read_table(tmp_path / "removed" / "removed.parquet")
    assert found.schema.names == ["id"]
    assert found["id"].to_pylist() == [row["uid"] for row in ledger(out) if "like" in (row["failed"] or ())]
    assert 3 < found.num_rows < 40


def test_what_is_refused(out: Path, tmp_path: Path, tiny_clip: tuple[Path, Path]) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        share(out, tmp_path / "there", "datacomp")
    with pytest.raises(UserError, match="holds no selection"):
        share(tmp_path, tmp_path / "new", "datacomp")
    with pytest.raises(UserError, match=f"--signal other: name one of {L14}"):
        share(out, tmp_path / "new", "clip-retrieval", "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", here)
        write_tar(tmp_path / "pool" / "0.tar", {"1": sample(1)})
        curate(parse_config({}), pools=[str(tmp_path / "pool")], out=tmp_path / "plain")
    for layout, message in (("clip-retrieval", "no signal of kind clip"), ("semdedup", "no selector of kind")):
        with pytest.raises(UserError, match=message):
            share(tmp_path / "plain", tmp_path / "new", layout)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new-*"))
