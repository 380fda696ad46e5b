"""Sets of values in files, and lists that go through them, against Python's own sets."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.selection import block_list, listed, uids
from curation.selection.block_list import BlockList
from curation.selection.interface import Apart, Fold
from curation.selection.listed import Listed, write_listed
from curation.selection.subset import numbers, paired


def values(numbers: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(str(n).encode()).digest() for n in numbers.tolist()]


def equal_halves(values: list[bytes]) -> np.ndarray:
    """A hash whose upper half is one of three."""
    return np.array([(int.from_bytes(v[:8]) % 3 << 62, int.from_bytes(v[8:16])) for v in values], np.uint64).reshape(
        -1, 2
    )


def driven(selector: BlockList, folder: Path) -> Listed:
    """What it decides about a column of text."""
    program = selector.decide()
    assert isinstance(program.send(None), Fold)
    apart = program.send(pa.string())
    assert isinstance(apart, Apart), "what the process that decides does not do itself"
    with pytest.raises(StopIteration) as end:
        program.send(apart.work(folder))
    return end.value.value  # type: ignore[no-any-return]


@pytest.mark.parametrize("hashes", [listed._hashes, equal_halves])
def test_a_set_in_files_is_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: object) -> None:
    monkeypatch.setattr(listed, "_hashes", hashes)
    rng = np.random.default_rng(0)
    members = values(rng.integers(0, 3_000, 2_000))
    found = write_listed(tmp_path, [members[start : start + 300] for start in range(0, 2_000, 300)])
    assert found.count == len(set(members))
    asked = values(np.arange(3_000))
    assert found.among(asked).tolist() == [value in set(members) for value in asked]
    assert found.among([]).tolist() == []
    none = write_listed(tmp_path, [])
    assert none.count == 0 and not none.among(asked).any()


@pytest.mark.parametrize("match", ["exact", "domain"])
def test_a_long_list_is_read_in_a_worker_and_some_lines_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: str
) -> None:
    monkeypatch.setattr(uids, "BLOCK", 100)
    file = tmp_path / "list.txt"
    file.write_text("".join(f"host{n}.org  # why\n" for n in range(2_500)))
    assert max(map(len, block_list.entry_blocks(file))) == 100
    selector = BlockList(column="url", file=str(file), match=match)  # type: ignore[arg-type]
    decision = driven(selector, tmp_path)
    assert len(pickle.dumps(decision)) < 500 and selector.describe(decision) == {"listed": 2_500}
    named = ["host7.org", "host2500.org", None, "host2499.org"]
    urls = named if match == "exact" else [n and f"https://a.{n}/x" for n in named]
    table = pa.table({"url": pa.array(urls, pa.string())})
    assert selector.apply(table, decision).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", ["npy", "txt"])
def test_uids_are_the_numbers_that_a_build_has(tmp_path: Path, kind: str) -> None:
    named = ["AB" * 16, "not-hex", "cd" * 16, "other"]
    file = tmp_path / f"taken-down.{kind}"
    if kind == "npy":
        np.save(file, np.sort(paired(*numbers(named[:3]))))
    else:
        file.write_text("\n".join(["ab" * 16, "not-hex", "CD" * 16]), "utf-8-sig")
    selector = BlockList(column="uid", file=str(file))
    decision = driven(selector, tmp_path)
    table = pa.table({"uid": [*named, "AB" * 15 + "AC"]})
    assert selector.apply(table, decision).tolist() == [False, False, False, True, True]
