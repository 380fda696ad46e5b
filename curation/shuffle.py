"""Rows of the whole pool brought together by bucket, through files: what makes a global decision without one process
that holds the pool.

    scatter   each partition of the pool writes its rows, sorted by bucket, as one Arrow file of a batch a bucket
    gather    each bucket reads its batch of every file, in the pool's order, and writes what it found by row
    between   a partition reads back what the buckets found of its own rows

All files are of Arrow's IPC format, written through a temporary
name and renamed, so that a worker that dies and is started again changes
nothing. Memory is that of one bucket; `buckets_for` makes as many as keep it so.

There are as many partitions and as many buckets as the pool is large, so files
opened by each for each would be its square. Where there are more than DIRECT
buckets, rows are cut twice, as the digits of a radix sort: into groups of some
sqrt(buckets) first, then, by a stretch of partitions and a group, into buckets.
What was found is merged until it lies in MERGED files. So partitions open a
bounded number of files, and buckets one for each of the stretches.
"""

import itertools
import math
import os
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MapParts = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""`map_parts(function, items)`: the function's results in the order of the items, as they come."""
Reduce = Callable[[Iterator[pa.Table]], tuple[pa.Table, Any]]
"""From a bucket's rows, about `BUCKET_BYTES` at a time and at least one table, to (table with `row`, summary)."""
BUCKET_BYTES = 16 << 20  # of rows as they are sent; reducing them takes some eight times as much
DIRECT = 512  # up to so many buckets, opening them all from everywhere costs less than cutting rows twice
MERGED = 64
FOUND_ROWS = 1 << 19  # of what was found, in memory while it is merged


def buckets_for(rows: int, row_bytes: int) -> int:
    return max(1, -(-rows * row_bytes // BUCKET_BYTES))


def hash_buckets(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of each uniform hash (uint64 [n]), ascending with it: int64 [n]."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def scatter(folder: Path, number: int, tables: Iterable[pa.Table], buckets: int) -> None:
    """Write the rows of partition `number`, some at a time and at least one table; the column `bucket` (integers below
    `buckets`) says where each goes."""
    width = _width(buckets)
    batches = (batch for table in tables for batch in _cut(table, 0, width, -(-buckets // width)))
    _write(_sent(folder, number), batches)


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """What the buckets found: tables with `row` (int64, ascending in each file) and a summary each."""

    folder: Path
    count: int  # of files
    merges: int = 0  # that made these files of those that the buckets wrote
    summaries: list[Any]

    def between(self, first: int, end: int) -> Iterator[pa.Table]:
        """What was found of the rows [first, end), by `row` in each table; one after the other, none of them empty."""
        for number in range(self.count):
            file = _opened(self.path(number))
            start = bisect_left(range(file.num_record_batches), first, key=lambda n: _last_row(file.get_batch(n)))
            for n in range(start, file.num_record_batches):
                batch = file.get_batch(n)
                low, high = np.searchsorted(batch["row"].to_numpy(), [first, end]).tolist()
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                if high < batch.num_rows:
                    break

    def in_order(self, rows: int, numbers: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Everything by `row`, at most about so many at a time and at least one batch; of the files of these numbers.

        Files are opened anew for each batch, because the pages of a map that stays count as memory.
        """
        paths = [self.path(number) for number in (range(self.count) if numbers is None else numbers)]
        window, begins = max(1, rows // max(1, len(paths))), [0] * len(paths)
        while paths:
            tables = [_opened(path).read_all() for path in paths]
            heads = [table.slice(begin, window) for table, begin in zip(tables, begins, strict=True)]
            places = [head["row"].to_numpy() for head in heads]
            more = [begin + window < table.num_rows for table, begin in zip(tables, begins, strict=True)]
            last = min((place[-1] for place, goes_on in zip(places, more, strict=True) if goes_on), default=None)
            # What a file has not shown yet comes after its window, so up to the first window's end nothing is missing.
            taken = [len(p) if last is None else int(np.searchsorted(p, last, "right")) for p in places]
            batch = _one_batch(pa.concat_tables(head.slice(0, n) for head, n in zip(heads, taken, strict=True)))
            yield batch.take(pc.sort_indices(batch["row"]))
            if last is None:
                return
            begins = [begin + n for begin, n in zip(begins, taken, strict=True)]

    def plus(self, table: pa.Table) -> "RowFiles":
        """With one file more, of what one process found (a table with `row`, ascending)."""
        _write(self.path(self.count), [_one_batch(table)])
        return replace(self, count=self.count + 1)

    def merged(self, map_parts: MapParts = map) -> "RowFiles":
        """The same in at most MERGED files, into which others go MERGED at a time; theirs go."""
        found = self
        while found.count > MERGED:
            groups = -(-found.count // MERGED)
            into = replace(found, count=groups, merges=found.merges + 1)
            for _ in map_parts(partial(_merge, found, into), range(groups)):
                pass
            for number in range(found.count):
                found.path(number).unlink()
            found = into
        return found

    def path(self, number: int) -> Path:
        return self.folder / f"out-{self.merges}-{number:06d}.arrow"


def _merge(found: RowFiles, into: RowFiles, number: int) -> None:
    files = range(number * MERGED, min((number + 1) * MERGED, found.count))
    _write(into.path(number), found.in_order(FOUND_ROWS, files))


def gather(
    folder: Path, partitions: int, buckets: int, row_bytes: int, reduce: Reduce, map_parts: MapParts
) -> RowFiles:
    """Reduce each bucket over what `partitions` partitions scattered into `folder`; their files go."""
    found = RowFiles(folder=folder, count=buckets if partitions else 0, summaries=[])
    if not partitions:
        return found
    way = _Way(folder=folder, partitions=partitions, buckets=buckets, rows=max(1, BUCKET_BYTES // row_bytes))
    if way.width > 1:
        for _ in map_parts(way.regroup, range(way.groups * way.stretches)):
            pass
        for number in range(partitions):
            _sent(folder, number).unlink()
    summaries = list(map_parts(partial(way.reduce, found, reduce), range(buckets)))
    for path in way.last():
        path.unlink()
    return replace(found, summaries=summaries).merged(map_parts)


def write_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...], pieces: Sequence[Path]) -> None:
    """One .npy, of rows of this shape, of what buckets have left as bytes in these files, which go; in their order."""
    size = sum(piece.stat().st_size for piece in pieces)
    rows = size // (dtype.itemsize * math.prod(shape))
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, *shape)})
        for piece in pieces:
            file.write(piece.read_bytes())
            piece.unlink()


@dataclass(frozen=True, kw_only=True)
class _Way:
    """From the files of the partitions to the buckets, `rows` at a time; over those of `regroup` if `width` > 1."""

    folder: Path
    partitions: int
    buckets: int
    rows: int

    @property
    def width(self) -> int:
        return _width(self.buckets)

    @property
    def groups(self) -> int:
        return -(-self.buckets // self.width)

    @property
    def stretches(self) -> int:
        """Each of as many partitions as there are groups, so that one group of it has about a partition's rows."""
        return -(-self.partitions // self.groups)

    def regroup(self, number: int) -> None:
        """Cut one group of one stretch into its buckets."""
        stretch, group = divmod(number, self.groups)
        sent = range(stretch * self.groups, min((stretch + 1) * self.groups, self.partitions))
        pieces = self._pieces((_sent(self.folder, n) for n in sent), group, self.groups)
        batches = (batch for piece in pieces for batch in _cut(piece, group * self.width, 1, self.width))
        _write(self._regrouped(group, stretch), batches)

    def reduce(self, found: RowFiles, reduce: Reduce, bucket: int) -> Any:
        group, at = divmod(bucket, self.width)
        if self.width == 1:
            pieces = self._pieces(self.last(), bucket, self.buckets)
        else:
            pieces = self._pieces((self._regrouped(group, n) for n in range(self.stretches)), at, self.width)
        table, summary = reduce(pieces)
        _write(found.path(bucket), [_one_batch(table.take(pc.sort_indices(table["row"])))])
        return summary

    def last(self) -> Iterator[Path]:
        """The files that buckets read."""
        if self.width == 1:
            return (_sent(self.folder, number) for number in range(self.partitions))
        both = itertools.product(range(self.groups), range(self.stretches))
        return (self._regrouped(group, stretch) for group, stretch in both)

    def _regrouped(self, group: int, stretch: int) -> Path:
        return self.folder / f"mid-{group:06d}-{stretch:06d}.arrow"

    def _pieces(self, paths: Iterable[Path], at: int, of: int) -> Iterator[pa.Table]:
        """The batches at this place of each `of` in every file, together as tables of about so many rows.

        They are read, not mapped: of each piece of a map, the kernel shows the neighbours too, so that the same rows in
        ten times as many files would take half as much again.
        """
        waiting: list[pa.RecordBatch] = []
        rows, given = 0, False
        for path in paths:
            file = _opened(path, pa.OSFile)
            for n in range(at, file.num_record_batches, of):
                waiting.append(file.get_batch(n))
                rows += waiting[-1].num_rows
                if rows >= self.rows:
                    yield pa.Table.from_batches(waiting)
                    waiting, rows, given = [], 0, True
        if waiting or not given:
            yield pa.Table.from_batches(waiting)


def _width(buckets: int) -> int:
    """How many buckets are in a batch that a partition sends."""
    return 1 if buckets <= DIRECT else math.isqrt(buckets - 1) + 1


def _cut(table: pa.Table, first: int, width: int, count: int) -> Iterator[pa.RecordBatch]:
    """The rows of the buckets from `first` on in so many batches of `width` buckets; rows of one bucket in their order.

    `bucket` stays a column where there is more to cut.
    """
    bucket = table["bucket"].to_numpy()
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], first + width * np.arange(count + 1)).tolist()
    batch = _one_batch((table if width > 1 else table.drop_columns("bucket")).take(pa.array(order)))
    return (batch.slice(start, end - start) for start, end in pairwise(ends))


def _sent(folder: Path, number: int) -> Path:
    return folder / f"in-{number:06d}.arrow"


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def _last_row(batch: pa.RecordBatch) -> int:
    """-1 of an empty one, which is the only one of its file."""
    return int(batch["row"][-1].as_py()) if batch.num_rows else -1


def _opened(path: Path, way: Callable[[str], pa.NativeFile] = pa.memory_map) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(way(str(path)))


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """A file of at least one batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    rest = iter(batches)
    first = next(rest)
    with pa.ipc.new_file(str(temporary), first.schema) as writer:
        for batch in itertools.chain([first], rest):
            writer.write_batch(batch)
    os.replace(temporary, path)
