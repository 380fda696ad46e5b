"""Tables beside the tars: their columns are in what signals see, whichever way a row is found."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import phases, pipeline, shuffle, sidecar
from curation.config import parse_config
from curation.errors import UserError
from curation.hashing import hash64
from curation.pipeline import curate
from curation.pool import list_shards
from curation.signals import SIGNALS
from curation.signals.interface import Decoded
from curation.workers import Workers
from tests.curation.conftest import sample, with_unheard_values, write_tar
from tests.curation.test_kill import here, nothing


@dataclass(frozen=True, kw_only=True)
class Said:
    """Column `said`: what the record says, as JSON."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"said": pa.string()}

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "Said":
        return self

    def see(self, sample: Decoded) -> str:
        return json.dumps(dict(sample.record), default=str)

    def columns(self, seen: Sequence[str]) -> dict[str, pa.Array]:
        return {"said": pa.array(seen, pa.string())}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "said", Said)
    monkeypatch.setattr(Workers, "map", here)
    for module in (phases, pipeline):
        monkeypatch.setattr(module, "write_report", nothing)


def measured(pools: list[Path], out: Path, unit_samples: int = 3) -> list[dict[str, Any]]:
    """The rows of the signals, in the pool's order, with the record read."""
    config = parse_config({"signals": {"said": {"kind": "said"}}, "unit_samples": unit_samples})
    curate(config, pools=[str(pool) for pool in pools], out=out)
    manifest = json.loads((out / "measure.manifest.json").read_text())
    parts = [pq.read_table(out / manifest["signal_set"] / part) for part in manifest["parts"]]
    rows = pa.concat_tables(parts).to_pylist()
    return [{**row, "said": row["said"] and json.loads(row["said"])} for row in rows]


def uid(n: int) -> str:
    return f"{n:032x}"


def test_img2datasets_table_beside_its_tar_by_key_and_by_uid(tmp_path: Path) -> None:
    bare = {f"{n:09d}": {"jpg": sample(n)["jpg"]} for n in range(4)}  # all that is known stands in the table
    bare["000000003"]["json"] = json.dumps({"uid": uid(3), "status": "of the json"}).encode()
    write_tar(tmp_path / "pool" / "00000.tar", bare)
    write_tar(tmp_path / "pool" / "00001.tar", {"x": sample(7), "y": sample(8)})
    table = pa.table(
        {
            "key": [f"{n:09d}" for n in range(4)],
            "uid": [uid(n) for n in range(4)],
            "caption": [f"caption {n}" for n in range(4)],
            "url": ["https://example.org"] * 4,
            "status": ["success"] * 4,
            "original_width": [100, 200, None, 400],
        }
    )
    pq.write_table(table.take([3, 1, 0, 2]), tmp_path / "pool" / "00000.parquet")
    pq.write_table(pa.table({"uid": [uid(8)], "license": ["CC0"]}), tmp_path / "pool" / "00001.parquet")
    rows = measured([tmp_path / "pool"], tmp_path / "out")
    assert [row["uid"] for row in rows] == [uid(n) for n in (0, 1, 2, 3, 7, 8)]
    assert [row["caption"] for row in rows[:4]] == [f"caption {n}" for n in range(4)]
    assert [row["url"] for row in rows[:4]] == ["https://example.org"] * 4
    assert [row["said"].get("original_width") for row in rows] == [100, 200, None, 400, None, None]
    assert [row["said"].get("status") for row in rows[:4]] == ["success"] * 3 + ["of the json"]
    assert [row["said"].get("license") for row in rows] == [None] * 5 + ["CC0"]


def metadata(path: Path, numbers: Sequence[int], add: float = 0) -> None:
    """DataComp's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "uid": [uid(n) for n in numbers],
        "url": [f"https://example.org/{n}" for n in numbers],
        "text": [f"text {n}" for n in numbers],
        "original_width": [1000 + n for n in numbers],
        "clip_l14_similarity_score": pa.array([n / 128 + add for n in numbers], pa.float32()),
        "face_bboxes": [[[0.25, 0.5, 0.75, 1.0]] * (n % 2) for n in numbers],
        "sha256": ["ab"] * len(numbers),
    }
    pq.write_table(pa.table(columns), path, row_group_size=5)


@pytest.mark.parametrize("beside", [False, True])
def test_datacomps_metadata_by_uid_whatever_file_it_is_in(tmp_path: Path, beside: bool) -> None:
    pool = tmp_path / "pool"
    for shard in range(3):
        write_tar(pool / f"{shard:08d}.tar", {str(n): sample(n) for n in range(shard * 6, shard * 6 + 6)})
    folder = pool if beside else tmp_path / "metadata"
    metadata(folder / "aaaa.parquet", [n for n in range(17, -1, -1) if n % 3])
    metadata(folder / "bbbb.parquet", [n for n in range(40) if n % 3 == 0 and n != 9])
    rows = measured([pool] if beside else [folder, pool], tmp_path / "out")
    assert len(rows) == 18 and not any(row["error"] for row in rows)
    for n, row in enumerate(rows):
        assert row["caption"] == sample(n)["txt"].decode()  # the tar's own, and not the metadata's
        if n == 9:
            assert "original_width" not in row["said"]
        else:
            assert row["said"]["original_width"] == 1000 + n
            assert row["said"]["clip_l14_similarity_score"] == n / 128
            assert row["said"]["face_bboxes"] == [[0.25, 0.5, 0.75, 1.0]] * (n % 2)


def test_a_null_of_the_json_says_nothing(tmp_path: Path) -> None:
    """The table's value stands, its uid too; a null that no table knows stays in the record."""
    record = {"uid": None, "key": "0", "caption": None, "score": None, "other": None, "said": 0}
    members = {"jpg": sample(0)["jpg"], "json": json.dumps(record).encode()}
    write_tar(tmp_path / "pool" / "0.tar", {"0": members})
    table = {"key": ["0"], "uid": [uid(7)], "caption": ["of the table"], "score": [0.5], "said": [1]}
    pq.write_table(pa.table(table), tmp_path / "pool" / "0.parquet")
    (row,) = measured([tmp_path / "pool"], tmp_path / "out")
    assert (row["uid"], row["caption"], row["error"]) == (uid(7), "of the table", None)
    expected = {"uid": uid(7), "key": "0", "caption": "of the table", "score": 0.5, "other": None, "said": 0}
    assert row["said"] == expected


@pytest.mark.parametrize("beside", ["tars", "metadata"])
def test_numbers_are_uids_whichever_side_has_them_as_text(tmp_path: Path, beside: str) -> None:
    for n, said in enumerate((10, "11")):
        write_tar(
            tmp_path / "tars" / f"{n}.tar", {"0": {"jpg": sample(n)["jpg"], "json": json.dumps({"uid": said}).encode()}}
        )
    for name, uids in (("0", [11, 10]), ("1", ["10", "11"])):
        (tmp_path / beside).mkdir(exist_ok=True)
        pq.write_table(
            pa.table({"uid": uids, "caption": [f"of {uid}" for uid in uids]}), tmp_path / beside / f"{name}.parquet"
        )
    pools = [tmp_path / "tars", *([tmp_path / beside] if beside == "metadata" else [])]
    rows = measured(pools, tmp_path / "out")
    assert [(row["caption"], row["said"]["uid"]) for row in rows] == [("of 10", 10), ("of 11", "11")]


def test_changed_tables_are_measured_again_and_the_build_copies_still(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    write_tar(pool / "0.tar", {str(n): sample(n) for n in range(5)})
    alone = list_shards([str(pool)])[0].fingerprint
    metadata(tmp_path / "one.parquet", range(5))
    pools = [pool, tmp_path / "one.parquet"]
    assert measured(pools, tmp_path / "a")[2]["said"]["clip_l14_similarity_score"] == 2 / 128
    metadata(tmp_path / "one.parquet", range(5), add=1)
    assert measured(pools, tmp_path / "b")[2]["said"]["clip_l14_similarity_score"] == 1 + 2 / 128
    with_table = list_shards([str(p) for p in pools])[0].fingerprint
    assert with_table.partition(".")[0] == alone != with_table
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["kept"] == 5


def test_a_table_that_cannot_be_read_is_one_row_of_its_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(4)})
    (tmp_path / "pool" / "0.parquet").write_bytes(b"PAR1 and then nothing")
    rows = measured([tmp_path / "pool"], tmp_path / "out")
    assert [(row["key"], row["error"]) for row in rows] == [
        *((str(n), None) for n in range(4)),
        ("", "sidecar_damaged"),
    ]


@pytest.mark.parametrize("beside", ["0", "metadata"])
def test_values_that_python_has_not_are_left_out_of_the_record(tmp_path: Path, beside: str) -> None:
    write_tar(tmp_path / "pool" / "0.tar", {"a": sample(0), "b": sample(1)})
    pq.write_table(with_unheard_values({"uid": [uid(0), uid(1)]}), tmp_path / "pool" / f"{beside}.parquet")
    rows = measured([tmp_path / "pool"], tmp_path / "out")
    assert [row["said"]["score"] for row in rows] == [1, 2] and [row["error"] for row in rows] == [None, None]
    assert {"day", "at", "zoned", "days"} <= set(rows[0]["said"]) and not {"day", "at", "zoned"} & set(rows[1]["said"])


@pytest.mark.parametrize("damaged", ["rows", "footer"])
@pytest.mark.parametrize("beside", ["tars", "metadata"])
def test_metadata_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, damaged: str, beside: str) -> None:
    """A footer says what a file holds: without one it is as the others of its folder are."""
    write_tar(tmp_path / "pool" / "0.tar", {"1": sample(1)})
    folder = tmp_path / ("pool" if beside == "tars" else "meta")
    metadata(folder / "one.parquet", range(3))
    if beside == "metadata":
        metadata(folder / "two.parquet", range(3, 5))
    start = pq.read_metadata(folder / "one.parquet").row_group(0).column(0).data_page_offset
    with open(folder / "one.parquet", "r+b") as f:
        f.seek(start if damaged == "rows" else -30, os.SEEK_SET if damaged == "rows" else os.SEEK_END)
        f.write(b"\xff" * 30)
    with pytest.raises(UserError, match=r"one\.parquet: metadata that cannot be read .*mend it or leave it out"):
        measured([tmp_path / "pool", folder], tmp_path / "out")


@pytest.mark.parametrize(("bucket_bytes", "direct"), [(1 << 24, 512), (160, 512), (160, 4)])
def test_the_index_has_every_uid_whatever_the_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, direct: int
) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(shuffle, "DIRECT", direct)
    monkeypatch.setattr(sidecar, "BATCH", 7)
    rng = np.random.default_rng(0)
    names, expected = [], []
    for file in range(5):
        uids = [None if n % 9 == 4 else uid(n) for n in rng.integers(0, 60, 30 * (file != 2)).tolist()]
        names.append(str(tmp_path / f"{file}.parquet"))
        column = "nothing" if file == 3 else ("uid", "UID")[file % 2]
        pq.write_table(pa.table({column: pa.array(uids, pa.string())}), names[-1])
        if file != 3:
            expected += [(hash64("uid", u), file, row, u) for row, u in enumerate(uids) if u is not None]
    expected.sort(key=lambda one: one[0])  # stable
    folder = sidecar.index_folder(tmp_path, names, "")
    sidecar.make_index(folder, names)
    assert np.load(folder / "hashes.npy").tolist() == [h for h, *_ in expected]
    assert np.load(folder / "places.npy").tolist() == [[file, row] for _, file, row, _ in expected]
    assert sorted(path.name for path in folder.iterdir()) == ["hashes.npy", "places.npy"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    found = sidecar.Metadata(folder, names)
    uids = sorted({u for *_, u in expected})
    assert {u: next(iter(row.values())) for u, row in found.rows([*uids, uid(99)]).items()} == {u: u for u in uids}


def test_each_file_of_metadata_is_read_once_for_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tar that was shuffled, every next row lies in another file."""
    odd = {"x": sample(90, json=b'{"uid": "\\ud800"}'), "y": sample(91, json=b"{"), "z": {"jpg": sample(92)["jpg"]}}
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n) for n in range(12)} | odd)
    for file in range(4):
        metadata(tmp_path / "meta" / f"{file}.parquet", [n for n in range(11) if n % 4 == file])
    read: list[str] = []
    real = sidecar._table
    monkeypatch.setattr(sidecar, "_table", lambda name: (read.append(name), real(name))[1])
    rows = measured([tmp_path / "pool", tmp_path / "meta"], tmp_path / "out", unit_samples=20)
    assert [Path(name).name for name in read] == [f"{file}.parquet" for file in range(4)]
    assert [row["said"].get("original_width") for row in rows[:12]] == [1000 + n for n in range(11)] + [None]
    assert [row["error"] for row in rows[12:]] == [None, "json_parse", "caption_missing"]


def test_uids_of_equal_hashes_have_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "hash64_many", lambda seed, uids: np.array([int(u, 16) % 2 for u in uids], np.uint64))
    names = [str(tmp_path / f"{file}.parquet") for file in range(3)]
    for file, name in enumerate(names):  # the last has uids of the others again
        metadata(Path(name), [n for n in range(10) if n % 2 == file or file == 2], add=file)
    folder = sidecar.index_folder(tmp_path, names, "equal")
    sidecar.make_index(folder, names)
    found = sidecar.Metadata(folder, names).rows([uid(n) for n in (9, 2, 3, 77)])
    assert {u: row["original_width"] for u, row in found.items()} == {uid(n): 1000 + n for n in (9, 2, 3)}
    assert {u: row["clip_l14_similarity_score"] for u, row in found.items()} == {
        uid(n): n / 128 + n % 2 for n in (9, 2, 3)
    }, "of two rows the first"


def test_tars_with_tables_of_their_own_share_one_index(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    for n in range(3):
        write_tar(pool / f"{n}.tar", {str(n): sample(n)})
        pq.write_table(pa.table({"key": [str(n)], "license": [f"L{n}"]}), pool / f"{n}.parquet")
    metadata(tmp_path / "one.parquet", range(3))
    rows = measured([pool, tmp_path / "one.parquet"], tmp_path / "out")
    assert [(row["said"]["license"], row["said"]["original_width"]) for row in rows] == [
        (f"L{n}", 1000 + n) for n in range(3)
    ]
    assert len(list((tmp_path / "out" / "signals" / "metadata").iterdir())) == 1
