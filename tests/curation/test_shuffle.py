"""Shuffles and the search for a rank, against plain NumPy."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import shuffle
from curation.selection import ranking
from curation.selection.interface import Count, Fold, Program, among, row_table
from curation.shuffle import gather, hash_buckets, scatter


def sums(pieces: Iterator[pa.Table]) -> tuple[pa.Table, int]:
    """Of each key of the bucket its last row and the sum of its values."""
    table = pa.concat_tables(pieces)
    found = table.group_by("key").aggregate([("row", "max"), ("value", "sum")])
    return pa.table({"row": found["row_max"], "sum": found["value_sum"], "key": found["key"]}), table.num_rows


@pytest.mark.parametrize(("buckets", "bucket_bytes"), [(1, 1 << 20), (7, 1 << 20), (7, 300), (40, 1)])
@pytest.mark.parametrize(("direct", "merged", "found_rows"), [(512, 64, 1 << 19), (6, 3, 5)])
def test_equal_keys_meet_whatever_the_buckets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    buckets: int,
    bucket_bytes: int,
    direct: int,
    merged: int,
    found_rows: int,
) -> None:
    """`direct` = 6 cuts twice, and merges three files at a time."""
    for name, value in zip(
        ("BUCKET_BYTES", "DIRECT", "MERGED", "FOUND_ROWS"), (bucket_bytes, direct, merged, found_rows)
    ):
        monkeypatch.setattr(shuffle, name, value)
    rng = np.random.default_rng(0)
    keys, values = rng.integers(0, 50, 1000), rng.integers(0, 9, 1000)
    hashes = (keys.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    cuts = [0, 0, 10, 500, 501, 1000]  # one partition is empty
    for number, (low, high) in enumerate(itertools.pairwise(cuts)):
        rows = {"key": keys[low:high], "value": values[low:high], "row": np.arange(low, high)}
        sent = pa.table({**rows, "bucket": hash_buckets(hashes[low:high], buckets)})
        scatter(tmp_path, number, [sent.slice(0, 100), sent.slice(100)], buckets)
    found = gather(tmp_path, len(cuts) - 1, buckets, 24, sums, map)
    assert sum(found.summaries) == 1000
    expected = {int(k): (int(np.flatnonzero(keys == k)[-1]), int(values[keys == k].sum())) for k in set(keys.tolist())}
    for low, high in [(0, 1000), (900, 960), (999, 1000), (0, 1)]:
        got = {k: (r, s) for t in found.between(low, high) for r, s, k in zip(*(c.to_pylist() for c in t.columns))}
        assert got == {k: v for k, v in expected.items() if low <= v[0] < high}
    rows = np.arange(300, 1000, 3)
    np.testing.assert_array_equal(among(rows, [found]), np.isin(rows, [r for r, _ in expected.values()]))
    assert len(list(tmp_path.iterdir())) == found.count <= merged, "what was sent is gone, and what was merged"
    assert [r for batch in found.in_order(7) for r in batch["row"].to_pylist()] == sorted(
        r for r, _ in expected.values()
    )


def test_files_opened_do_not_grow_with_the_square_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 partitions and 60 buckets each opening all of the others' would be 7,200."""
    monkeypatch.setattr(shuffle, "DIRECT", 8)
    monkeypatch.setattr(shuffle, "MERGED", 8)
    opened: list[Path] = []
    opener = shuffle._opened
    monkeypatch.setattr(shuffle, "_opened", lambda path, *way: opened.append(path) or opener(path, *way))
    for number in range(60):
        rows = np.arange(100 * number, 100 * number + 100)
        sent = {"key": rows, "value": rows, "row": rows, "bucket": rows * 7919 % 60}
        scatter(tmp_path, number, [pa.table(sent)], 60)
    found = gather(tmp_path, 60, 60, 24, sums, map)
    # 8 groups of 8 buckets, 8 stretches of 8 partitions; then 60 files are merged to 8, at once, and looked into.
    assert len(opened) == 60 * 8 + 60 * 8 + 60
    assert sum(t.num_rows for first in range(0, 6000, 100) for t in found.between(first, first + 100)) == 6000
    assert len(opened) == 60 * 8 + 60 * 8 + 60 + 60 * 8


def test_one_bucket_with_all_rows_is_cut_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 240)
    monkeypatch.setattr(shuffle, "DIRECT", 3)
    cut, sizes = shuffle._cut, []
    monkeypatch.setattr(shuffle, "_cut", lambda table, *a: sizes.append(table.num_rows) or cut(table, *a))
    for number in range(20):
        scatter(tmp_path, number, [pa.table({"row": np.arange(5 * number, 5 * number + 5), "bucket": [5] * 5})], 9)
    found = gather(tmp_path, 20, 9, 24, lambda pieces: (pa.concat_tables(pieces), None), map)
    assert max(sizes) == 10 and found.count == 9
    assert [t["row"].to_pylist() for t in found.between(0, 100)] == [list(range(100))]


def test_pieces_come_in_order_and_no_larger_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 240)
    for number in range(20):
        rows = np.arange(5 * number, 5 * number + 5)
        scatter(tmp_path, number, [pa.table({"row": rows, "bucket": np.zeros(5, int)})], 1)

    def look(pieces: Iterator[pa.Table]) -> tuple[pa.Table, list[int]]:
        tables = list(pieces)
        return row_table(pa.concat_tables(tables)["row"].to_numpy()[::-1]), [t.num_rows for t in tables]

    found = gather(tmp_path, 20, 1, 24, look, map)
    assert found.summaries == [[10] * 10]
    assert next(found.between(0, 100))["row"].to_pylist() == list(range(100))


def answer(program: Program, tables: Sequence[pa.Table]) -> Any:
    """Drive a program of counts and folds over tables that are all in scope."""
    reply: Any = None
    while True:
        try:
            request = program.send(reply)
        except StopIteration as end:
            return end.value
        if isinstance(request, Count):
            reply = sum(table.num_rows for table in tables)
        else:
            assert isinstance(request, Fold)
            reply = None
            for n, table in enumerate(tables):
                reply = request.local(table) if n == 0 else request.merge(reply, request.local(table))


VALUES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 0.3]), st.floats(-1e6, 1e6), st.floats()),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    values=VALUES,
    fraction=st.floats(0.01, 1.0),
    mode=st.sampled_from(["datacomp", "exact"]),
    listed=st.sampled_from([1, 4, 1 << 18]),
    width=st.sampled_from([np.float32, np.float64]),
    data=st.data(),
)
def test_what_ranks_highest_is_what_sorting_says(
    values: list[float], fraction: float, mode: Any, listed: int, width: Any, data: st.DataObject
) -> None:
    numbers = np.array(values).astype(width)
    n = len(numbers)
    uids = data.draw(st.lists(st.sampled_from("abcé"), min_size=n, max_size=n))
    cut = data.draw(st.integers(0, n))
    table = pa.table({"value": numbers, "uid": uids, "row": np.arange(n)})
    values_of = partial(column, "value")
    before, ranking.LISTED = ranking.LISTED, listed
    try:
        edge = answer(ranking.highest(values_of, fraction, mode), [table.slice(0, cut), table.slice(cut)])
    finally:
        ranking.LISTED = before
    kept = ranking.stays(numbers, table, edge)
    lowest = np.where(np.isnan(numbers), -np.inf, numbers)
    if mode == "datacomp":
        threshold = np.sort(lowest)[::-1][min(int(n * fraction), n - 1)]
        expected = (lowest >= threshold) & ~np.isnan(numbers)
    else:
        order = sorted(range(n), key=lambda i: (-lowest[i], uids[i].encode(), i))
        expected = np.zeros(n, bool)
        expected[order[: int(n * fraction)]] = True
        expected &= lowest > -np.inf  # what cannot be told from nothing never stays
    np.testing.assert_array_equal(kept, expected)


def column(name: str, table: pa.Table) -> np.ndarray:
    return table[name].to_numpy()
