"""Rows of the whole pool brought together by bucket, through files: what makes a global decision without one process
that holds the pool.

    scatter   each partition of the pool writes its rows, sorted by bucket, as one Arrow file of a batch a bucket
    gather    each bucket reads its batch of every file, in the pool's order, and writes what it found by row
    between   a partition reads back what the buckets found of its own rows

All files are memory maps of Arrow's IPC format, written through a temporary
name and renamed, so that a worker that dies and is started again changes
nothing. Memory is that of one bucket; `buckets_for` makes as many as keep it so.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
_OUT = "out-{:06d}.arrow"


def buckets_for(rows: int, row_bytes: int) -> int:
    return max(1, -(-rows * row_bytes // BUCKET_BYTES))


def hash_buckets(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of each uniform hash (uint64 [n]), ascending with it: int64 [n]."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def scatter(folder: Path, number: int, table: pa.Table, buckets: int) -> None:
    """Write the rows of partition `number`; the column `bucket` (integers below `buckets`) says where each goes."""
    bucket = table["bucket"].to_numpy()
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(buckets + 1)).tolist()
    batch = _one_batch(table.drop_columns("bucket").take(pa.array(order)))
    slices = (batch.slice(start, end - start) for start, end in pairwise(ends))
    _write(folder / f"in-{number:06d}.arrow", batch.schema, slices)


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """What the buckets found: a table with `row` (int64, ascending) and a summary each."""

    folder: Path
    summaries: list[Any]

    def between(self, first: int, end: int) -> Iterator[tuple[int, pa.Table]]:
        """(bucket, what it found of the rows [first, end)), where it found something."""
        for bucket in range(len(self.summaries)):
            table = _read(self.folder / _OUT.format(bucket), 0)
            low, high = np.searchsorted(table["row"].to_numpy(), [first, end]).tolist()
            if low < high:
                yield bucket, pa.Table.from_batches([table.slice(low, high - low)])


def write_rows(folder: Path, table: pa.Table) -> RowFiles:
    """What one process found (a table with `row`, ascending), as the files of a shuffle of one bucket."""
    _write(folder / _OUT.format(0), table.schema, [_one_batch(table)])
    return RowFiles(folder=folder, summaries=[None])


def gather(
    folder: Path, partitions: int, buckets: int, row_bytes: int, reduce: Reduce, map_parts: MapParts
) -> RowFiles:
    """Reduce each bucket over what `partitions` partitions scattered into `folder`; their files go."""
    if not partitions:
        return RowFiles(folder=folder, summaries=[])
    task = partial(_reduce, folder, partitions, max(1, BUCKET_BYTES // row_bytes), reduce)
    summaries = list(map_parts(task, range(buckets)))
    for number in range(partitions):
        _in(folder, number).unlink()
    return RowFiles(folder=folder, summaries=summaries)


def _reduce(folder: Path, partitions: int, chunk_rows: int, reduce: Reduce, bucket: int) -> Any:
    table, summary = reduce(_pieces(folder, partitions, chunk_rows, bucket))
    table = table.take(pc.sort_indices(table["row"]))
    _write(folder / _OUT.format(bucket), table.schema, [_one_batch(table)])
    return summary


def _pieces(folder: Path, partitions: int, chunk_rows: int, bucket: int) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    given = False
    for number in range(partitions):
        waiting.append(_read(_in(folder, number), bucket))
        if sum(batch.num_rows for batch in waiting) >= chunk_rows:
            yield pa.Table.from_batches(waiting)
            waiting, given = [], True
    if waiting or not given:
        yield pa.Table.from_batches(waiting)


def _in(folder: Path, number: int) -> Path:
    return folder / f"in-{number:06d}.arrow"


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def _read(path: Path, batch: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(batch)


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with pa.ipc.new_file(str(temporary), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    os.replace(temporary, path)
