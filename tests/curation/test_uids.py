"""Lists of uids in every form against Python's own integers, over a pool whose uids are of all kinds."""

import hashlib
import pickle
import string
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from curation.ledger import write_ledger
from curation.plan import plan
from curation.selection import engine, subset, uids
from curation.selection import listed as listing
from curation.selection.block_list import BlockList
from curation.selection.engine import Part
from curation.selection.fraction import Fraction
from curation.selection.interface import Apart
from curation.selection.uids import Uids
from tests.curation.selecting import select
from tests.curation.test_selection import keeps, valid_of, write_parts

ROWS = 10_000
ODD = ["g" * 32, "0" * 31, "0" * 33, "0" * 32, "F" * 32, "a" * 32 + "\n", " " + "b" * 31, "٣" * 32, "x", "ü/7 8", ""]


def number(uid: str) -> int:
    spelt = len(uid) == 32 and set(uid) <= set(string.hexdigits)
    return int(uid if spelt else hashlib.md5(uid.encode()).hexdigest(), 16)


def save(path: Path, listed: list[int]) -> str:
    np.save(path, np.array([(n >> 64, n & (2**64 - 1)) for n in listed], "u8,u8"))
    return str(path)


def raw(listed: list[int]) -> bytes:
    """As DataComp's subsets are without a header: both halves, the lowest byte first."""
    return b"".join(struct.pack("<QQ", n >> 64, n & (2**64 - 1)) for n in listed)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    forms = ["{:032x}", "{:032X}", "shop/{}"]
    uids = [forms[i % 3].format(int(h)) for i, h in enumerate(rng.integers(0, 2**62, ROWS))]
    uids[500 : 500 + len(ODD)] = ODD
    uids[7000:7020] = [uid.swapcase() for uid in uids[6000:6020]]  # the same numbers once more, where they are hex
    error = pa.array(np.where(rng.random(ROWS) < 0.02, "image_decode", None).tolist(), pa.string())
    return pa.table(
        {
            "uid": uids,
            "error": error,
            "score": rng.random(ROWS).astype(np.float32),
            "shard": ["0.tar"] * ROWS,
            "key": [str(n) for n in range(ROWS)],
            "extensions": pa.array([["jpg", "txt"]] * ROWS, pa.list_(pa.string())),
            "sizes": pa.array([[10, 20]] * ROWS, pa.list_(pa.int64())),
        }
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[Part]:
    return write_parts(tmp_path_factory.mktemp("parts"), table, [1, 2500, 2600, 7000])


def test_the_list_of_a_build_selects_what_was_built(table: pa.Table, parts: list[Part], tmp_path: Path) -> None:
    pool = engine.partitions(parts, 2_000)
    selection = engine.run({"best": Fraction(column="score", fraction=0.3)}, pool, tmp_path / "select")
    write_ledger(tmp_path / "ledger", pool, selection)
    made = plan(pool, tmp_path / "ledger", tmp_path / "plan", seed=0, shard_samples=1000, members={})
    built = ~np.concatenate([selection.state(partition).failed[:, 0] for partition in pool]) & valid_of(table)
    of = [number(uid) for uid in table["uid"].to_pylist()]
    wanted = {of[i] for i in np.flatnonzero(built)}
    expected = np.array([n in wanted for n in of])
    assert expected[built].all() and 0 < (expected & ~built).sum() < 60, "of numbers that are twice in the pool"
    found = select({"uids": Uids(file=str(made.ids), repeats="once")}, parts)
    np.testing.assert_array_equal(found.failed[valid_of(table), 0], ~expected[valid_of(table)])
    stage = found.stages[0]
    assert stage["listed"] == stage["found"] == stage["copies"] == len(wanted) > 2_900


@pytest.mark.parametrize("form", ["sorted.npy", "mixed.npy", "raw.npy", "raw.bin", "list.txt", "list.parquet"])
def test_every_form_in_either_case_and_what_is_not_in_the_pool(
    form: str, table: pa.Table, parts: list[Part], tmp_path: Path
) -> None:
    valid, uids = valid_of(table), table["uid"].to_pylist()
    listed = [uid for uid in uids[::7] if uid.strip() and uid == uid.strip()]
    listed = [uid.swapcase() if number(uid.swapcase()) == number(uid) else uid for uid in listed] + ["of others"] * 3
    wanted, file = {number(uid) for uid in listed}, tmp_path / form
    if form.startswith("raw"):
        file.write_bytes(raw(sorted(map(number, listed))))
    elif file.suffix == ".npy":
        save(file, sorted(map(number, listed)) if form == "sorted.npy" else list(map(number, listed)))
    elif file.suffix == ".parquet":
        pq.write_table(pa.table({"uid": pa.array([*listed, None])}), file)
    else:
        file.write_text("\n".join(listed) + "\n\n")
    expected = np.array([number(uid) in wanted for uid in uids])
    found = select({"uids": Uids(file=str(file))}, parts)
    np.testing.assert_array_equal(found.failed[valid, 0], ~expected[valid])
    here = {number(uid) for uid in np.array(uids, object)[valid & expected]}
    stage = found.stages[0]
    assert (stage["listed"], stage["found"], stage["copies"]) == (len(wanted), len(here), len(listed))
    assert 1_000 < stage["found"] < stage["listed"]
    np.testing.assert_array_equal(keeps(BlockList(column="uid", file=str(file)), parts)[valid], ~expected[valid])


@pytest.mark.parametrize("name", ["list.txt", "list.npy"])
def test_a_uid_is_kept_as_often_as_the_list_has_it(
    name: str, table: pa.Table, parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subset, "BLOCK", 7)  # so that repeats go from one block of the list into the next
    uids, valid = table["uid"].to_pylist(), valid_of(table)
    listed = [*uids[:450:3], *uids[:300], *uids[100:200]]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    save(tmp_path / "list.npy", sorted(map(number, listed)))
    selectors = {"uids": Uids(file=str(tmp_path / name)), "half": Fraction(column="score", fraction=0.5)}
    found = select(selectors, parts)
    counts = Counter(map(number, listed))
    often = np.array([counts[number(uid)] for uid in uids])
    assert set(often) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found.failed[valid, 0], often[valid] == 0)
    np.testing.assert_array_equal(found.copies[valid], np.maximum(often, 1)[valid])
    assert found.stages[0]["copies"] == len(listed)
    once = select({"uids": Uids(file=str(tmp_path / name), repeats="once")}, parts)
    np.testing.assert_array_equal(once.failed[:, 0], found.failed[:, 0])
    assert set(once.copies) == {1}
    assert once.stages[0]["copies"] == once.stages[0]["listed"] == len(counts)


def test_a_list_of_nothing_or_of_others_keeps_nothing(table: pa.Table, parts: list[Part], tmp_path: Path) -> None:
    for listed in ([], [1, 2, 2**128 - 2]):
        found = select({"uids": Uids(file=save(tmp_path / "list.npy", listed))}, parts)
        assert found.failed[valid_of(table)].all()
        assert (found.stages[0]["listed"], found.stages[0]["found"]) == (len(listed), 0)


def test_what_is_no_list_is_refused(parts: list[Part], tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.arange(3))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "text.parquet").write_text("no table")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "falls.npy").write_bytes(raw([2**127, 2**126]))
    (tmp_path / "cut.npy").write_bytes(raw([2**126, 2**127])[:-1])
    (tmp_path / "latin.txt").write_bytes("über alles hier\nöde\nähren der Erde\n".encode("latin-1")[:32])
    for name, message in (("list.npy", "a DataComp subset has u8,u8"), *((n, "cannot be read") for n in (
        "text.npy", "list.txt", "text.parquet", "empty.npy", "falls.npy", "cut.npy", "latin.txt"))):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            select({"uids": Uids(file=str(tmp_path / name))}, parts)


@pytest.mark.parametrize("form", ["npy", "txt", "parquet"])
def test_one_worker_sorts_a_list_and_holds_a_part_of_it(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters, which differ in their last bits alone, some of them twice; the list itself goes to no other process."""
    monkeypatch.setattr(uids, "STRIDE", 8)
    monkeypatch.setattr(uids, "BLOCK", 400)
    monkeypatch.setattr(subset, "BLOCK", 400)
    listed = np.random.default_rng(1).permutation(20_000) % 15_000
    named, file = [f"{n:032x}" for n in listed.tolist()], tmp_path / f"list.{form}"
    if form == "npy":
        save(file, listed.tolist())
    elif form == "parquet":
        pq.write_table(pa.table({"uid": named}), file)
    else:
        file.write_text("\n".join(named))
    held: list[int] = []
    sort = listing.np.lexsort
    monkeypatch.setattr(listing.np, "lexsort", lambda keys: (held.append(len(keys[0])), sort(keys))[1])
    program = Uids(file=str(file)).decide()
    apart = program.send(None)
    assert isinstance(apart, Apart)
    found, distinct, total = apart.work(tmp_path / "made")
    assert (distinct, total) == (15_000, 20_000) and len(pickle.dumps(found)) < 500
    assert np.array_equal(np.load(found.path)["f1"], np.sort(listed)) and not np.load(found.path)["f0"].any()
    assert max(held) <= 20_000 / 8 and sorted(held)[-2] < 2 * 20_000 / listing.PARTS, "the sample, and each part"
    assert [path.name for path in found.path.parent.iterdir()] == ["uids.npy"]


def test_a_short_list_holds_no_more_of_the_pool_than_any_other(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two uids cut the pool into three ranges, whatever it holds."""
    numbered, valid = [number(uid) for uid in table["uid"].to_pylist()], valid_of(table)
    held: list[int] = []
    sort = subset.np.lexsort
    monkeypatch.setattr(subset.np, "lexsort", lambda keys: (held.append(len(keys[0])), sort(keys))[1])
    listed = sorted(numbered[i] for i in np.flatnonzero(valid)[[100, 9_000]])
    parts = write_parts(tmp_path, table, [*range(250, ROWS, 250)])
    found = select({"it": Uids(file=save(tmp_path / "two.npy", listed))}, parts, 100, bucket_bytes=2_400)
    expected = np.array([n not in listed for n in numbered])
    np.testing.assert_array_equal(found.failed[valid, 0], expected[valid])
    assert found.stages[0]["found"] == 2 and max(held) <= 400, "a hundred make a piece, and a batch comes whole"
