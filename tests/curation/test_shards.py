"""The build: bytes, order, offsets and the files beside the tars, read by tarfile and webdataset."""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from curation import plan as planning
from curation import shards, shuffle
from curation.errors import UserError
from curation.hashing import hash64
from curation.ledger import SCHEMA
from curation.measure import Measuring
from curation.plan import plan
from curation.pool import list_shards
from curation.selection import engine
from curation.selection.engine import Part
from curation.selection.subset import paired
from curation.shards import Copying
from curation.store import Unit, open_set
from tests.curation.conftest import sample, write_tar

SHARD_SAMPLES = 20
DROPPED = {5, 17, 44}


def build(folder: Path, pool: Path, order: list[int], members: dict[str, str] | None = None, repeated: int = 1) -> Path:
    """Measure nothing, drop `DROPPED` by place in the pool, and copy the input shards in this order; of each third
    sample `repeated` copies."""
    signal_set = open_set(folder / "signals", {}, 16, None)
    measure = Measuring(signals={}, signal_set=signal_set)()
    parts, first = [], 0
    (folder / "ledger").mkdir(parents=True)
    for shard in list_shards([str(pool)]):
        rows = measure(shard)["rows"]
        for number in range(-(-rows // 16)):
            unit = Unit(shard=shard, number=number, rows=min(16, rows - 16 * number))
            measure(unit)
            table = pq.read_table(signal_set.path(unit))
            wanted = [repeated if (first + i) % 3 == 0 else 1 for i in range(table.num_rows)]
            kept = [e is None and first + i not in DROPPED for i, e in enumerate(table["error"].to_pylist())]
            copies = [n * k for n, k in zip(wanted, kept, strict=True)]
            ledger = {**{n: table[n] for n in ("uid", "shard", "key")}, "copies": pa.array(copies, pa.int32())}
            ledger |= {n: pa.nulls(len(copies), SCHEMA.field(n).type) for n in ("verdict", "reason", "failed")}
            pq.write_table(pa.table(ledger), folder / "ledger" / unit.part)
            parts.append(Part(path=signal_set.path(unit), first=first, rows=unit.rows))
            first += unit.rows
    hidden = folder / ".build"
    shards.prepare(hidden)
    made = plan(
        engine.partitions(parts, rows=40),
        folder / "ledger",
        hidden / "plan",
        seed=9,
        shard_samples=SHARD_SAMPLES,
        members=members or {},
    )
    for index in order:
        Copying(hidden, made).do(made.inputs[index])
    shards.finish(hidden, folder / "shards", made)
    return folder / "shards"


@pytest.fixture(scope="module")
def sources(pool: Path) -> dict[str, list[dict[str, bytes]]]:
    """What should be in the shards, by uid: read by tarfile and kept by this test's own reading of the pool."""
    found: dict[str, list[dict[str, bytes]]] = {}
    place = 0
    for path in sorted(pool.glob("*.tar")):
        by_key: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                by_key.setdefault(key, {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
        for key, members in by_key.items():
            if int(key) not in {120, 121, 122, 123, 124} and place not in DROPPED:
                text, image = members["txt"], members.get("jpg") or members["png"]
                uid = json.loads(members["json"])["uid"] if "json" in members else hashlib.md5(image + text).hexdigest()
                found.setdefault(uid, []).append(members)
            place += 1
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> Path:
    return build(tmp_path_factory.mktemp("built"), pool, [0, 1, 2, 3])


def _parted(key: str) -> tuple[str, str, str]:
    return key.rpartition("-")


def test_every_member_is_byte_equal_and_in_hash_order(built: Path, sources: dict[str, list[dict[str, bytes]]]) -> None:
    keys: list[str] = []
    for path in sorted(built.glob("*.tar")):
        by_key: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                by_key.setdefault(key, {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
        assert path.stat().st_size % 512 == 0 and len(by_key) <= SHARD_SAMPLES
        for key, members in by_key.items():
            uid, _, copy = key.rpartition("-")
            assert members == sources[uid][int(copy)]
        keys += by_key
    uids = [key.rpartition("-")[0] for key in keys]
    assert Counter(uids) == {uid: len(members) for uid, members in sources.items()}
    assert len(set(keys)) == len(keys) and max(Counter(uids).values()) == 2
    hashes = [hash64("9/shuffle", *([uid] if copy == "0" else [uid, copy])) for uid, _, copy in map(_parted, keys)]
    assert hashes == sorted(hashes)


def test_webdataset_reads_them(built: Path, sources: dict[str, list[dict[str, bytes]]]) -> None:
    urls = [str(p) for p in sorted(built.glob("*.tar"))]
    found = Counter(s["__key__"].rpartition("-")[0] for s in wds.WebDataset(urls, shardshuffle=False))
    assert found == {uid: len(members) for uid, members in sources.items()}


def test_files_beside_the_tars(built: Path, sources: dict[str, list[dict[str, bytes]]]) -> None:
    total = sum(map(len, sources.values()))
    sizes = json.loads((built / "sizes.json").read_text())
    names = sorted(p.name for p in built.glob("*.tar"))
    assert list(sizes) == names and sum(sizes.values()) == total
    assert set(list(sizes.values())[:-1]) == {SHARD_SAMPLES}
    index = json.loads((built / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert {s["url"]: s["nsamples"] for s in index["shardlist"]} == sizes
    meta = json.loads((built / "meta.json").read_text())
    assert [meta["output_shard_format"].format(i) for i in range(meta["output_shard_count"])] == names
    for i, n in enumerate(sizes.values()):
        assert json.loads((built / f"{i:08d}_stats.json").read_text())["successes"] == n
    ids = np.load(built / "sample_ids.npy")
    expected = sorted((int(u[:16], 16), int(u[16:], 16)) for u, m in sources.items() for _ in m)
    assert ids.dtype == np.dtype("u8,u8") and ids.tolist() == expected


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_any_order_of_input_shards_gives_the_same_bytes(tmp_path: Path, built: Path, pool: Path) -> None:
    assert digests(build(tmp_path, pool, [3, 1, 0, 2])) == digests(built)


def test_plans_in_buckets_are_the_plan(
    tmp_path: Path, built: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 400)
    assert shuffle.buckets_for(130, 36) == 12
    assert digests(build(tmp_path, pool, [0, 1, 2, 3])) == digests(built)


def test_repeats_lie_apart_and_new_members_beside_the_old(
    tmp_path: Path, sources: dict[str, list[dict[str, bytes]]], pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1_000)
    folder = build(tmp_path, pool, [1, 0, 3, 2], {"url.txt": "url"}, repeated=4)
    places: dict[str, list[int]] = {}
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                if key not in found:
                    places.setdefault(key.rpartition("-")[0], []).append(len(found))
                assert extension not in found.setdefault(key, {})
                found[key][extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    copies = Counter(key.rpartition("-")[0] for key in found)
    assert set(copies) == set(sources) and {n for n in copies.values()} >= {1, 4}
    for uid, n in copies.items():
        assert {f"{uid}-{j}" for j in range(n)} <= set(found)
        contents = [{e: b for e, b in found[f"{uid}-{j}"].items() if e != "url.txt"} for j in range(n)]
        assert all(content in sources[uid] for content in contents)
        assert all(original in contents for original in sources[uid])
    for members in found.values():
        url = json.loads(members["json"]).get("url") if "json" in members else None
        assert members.get("url.txt") == (url.encode() if url else None)
    gaps = [b - a for spots in places.values() for a, b in pairwise(spots)]
    assert np.mean(gaps) > len(found) / 10  # beside one another the mean would be 1
    ids = np.load(folder / "sample_ids.npy")
    assert ids.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u, n in copies.items() for _ in range(n))


def test_a_new_member_that_is_there_already_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "pool" / "0.tar", {"a": sample(1), "b": {**sample(2), "alt.txt": b"other"}})
    with pytest.raises(UserError, match=r"members: samples of the pool have one of alt.txt already"):
        build(tmp_path, tmp_path / "pool", [0], {"alt.txt": "caption"})


def test_many_members_and_an_empty_one(tmp_path: Path) -> None:
    members = {**sample(1), **{f"m{i}": bytes([i % 256]) * i for i in range(600)}}
    write_tar(tmp_path / "pool" / "00000.tar", {"a": members, "b": sample(2)})
    folder = build(tmp_path, tmp_path / "pool", [0])
    with tarfile.open(folder / "00000000.tar") as tar:
        found = {i.name.partition(".")[2]: tar.extractfile(i).read() for i in tar if i.name.startswith(f"{1:032x}")}  # type: ignore[union-attr]
    assert found == members


@pytest.mark.parametrize("buckets", [2, 10_000])
def test_ranges_are_even_however_many(buckets: int) -> None:
    """Over uids that are uniform, a range holds what lies between its ends. 10,000 buckets are 4.7 billion rows."""
    rows = buckets * shuffle.BUCKET_BYTES // planning.ROW_BYTES
    pool = [engine.Partition(number=0, parts=(engine.Part(path=Path("none"), first=0, rows=rows),))]
    rng, sampled = np.random.default_rng(0), []

    def drawn(sample: partial[np.ndarray], pool: Sequence[engine.Partition]) -> list[np.ndarray]:
        sampled.append(rng.binomial(rows, sample.args[1]))
        return [paired(*rng.integers(0, 2**64, (2, sampled[-1]), dtype=np.uint64))]

    cuts = planning._splitters(pool, Path("none"), buckets, drawn)
    sizes = buckets * np.diff(np.concatenate([[0], cuts["f0"] / 2**64, [1]]))
    assert len(sizes) == buckets and sizes.min() > 0.4 and sizes.max() < 1.7
    assert sampled[0] < 5_000 + 70 * buckets, "all of it is in one process"


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_ranges_of_a_pool_that_is_there(tmp_path: Path, kept: float) -> None:
    """Counters, of which all have the same first bits; and a pool of which nothing is kept, which ends as any other."""
    rng, pool, wanted = np.random.default_rng(0), [], []
    for number in range(6):
        uids = [f"{n:032x}" for n in range(3_000 * number, 3_000 * number + 3_000)]
        copies = (rng.random(3_000) < kept).astype(np.int32)
        wanted += [int(uid, 16) for uid, n in zip(uids, copies, strict=True) if n]
        pq.write_table(pa.table({"uid": uids, "copies": copies}), tmp_path / f"{number}.parquet")
        part = engine.Part(path=tmp_path / f"{number}.parquet", first=3_000 * number, rows=3_000)
        pool.append(engine.Partition(number=number, parts=(part,)))
    cuts = planning._splitters(pool, tmp_path, 20, map)
    sizes = np.histogram(wanted, [0, *cuts["f1"].tolist(), 2**63])[0]
    assert len(cuts) == 19 and not cuts["f0"].any() and sizes.sum() == len(wanted)
    assert sizes.max() <= 1.6 * len(wanted) / 20
