"""The ledger: one row for every sample seen, with its verdict and every reason against it.

One parquet file for each part of the signals, in the same order, so the two can
be read side by side. The folder appears by a rename when all of it is written.
"""

import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.selection.engine import Part, Partition, Selection, State, read_columns
from curation.shuffle import MapParts

VERDICTS = pa.array(["kept", "dropped", "error"])
SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("verdict", pa.string()),  # of VERDICTS
        ("reason", pa.string()),  # the first selector that dropped it, or the error
        ("failed", pa.list_(pa.string())),  # all selectors that would have dropped it
        ("copies", pa.int32()),  # how often it is in the shards
    ]
)
REPEATED = ["shard", "verdict", "reason", "failed.list.element"]  # the columns of few values


def write_ledger(
    folder: Path, pool: Sequence[Partition], selection: Selection, map_parts: MapParts = map
) -> dict[str, Any]:
    """Write the ledger and count it.

    Returns:
        {"seen", "kept", "dropped": {reason: n}, "errors": {reason: n}}
    """
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    names = [stage["name"] for stage in selection.stages]
    counts: Counter[tuple[str, str | None]] = Counter()
    for counted in map_parts(partial(_write_partition, temporary, names, selection), pool):
        counts.update(counted)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return {
        "seen": counts.total(),
        "kept": sum(n for (verdict, _), n in counts.items() if verdict == "kept"),
        "dropped": {name: counts["dropped", name] for name in names if counts["dropped", name]},
        "errors": {str(reason): n for (verdict, reason), n in sorted(counts.items(), key=str) if verdict == "error"},
    }


def _write_partition(
    folder: Path, names: list[str], selection: Selection, partition: Partition
) -> Counter[tuple[str, str | None]]:
    state, counts = selection.state(partition), Counter[tuple[str, str | None]]()
    for part in partition.parts:
        start = part.first - partition.first
        counts += _write_part(folder, names, part, state.rows(start, start + part.rows))
    return counts


def _write_part(folder: Path, names: list[str], part: Part, state: State) -> Counter[tuple[str, str | None]]:
    table = read_columns(part.path, ["uid", "shard", "key", "error"])
    valid, failed = state.valid, state.failed
    kept = valid & ~failed.any(axis=1)
    called = pa.array(names, pa.string())
    verdict = VERDICTS.take(pa.array(np.where(valid, np.where(kept, 0, 1), 2)))
    first = pa.array(failed.argmax(axis=1) if names else np.zeros(part.rows, int), mask=~valid | kept)
    reason = pc.coalesce(called.take(first), table["error"])
    ends = np.concatenate([[0], failed.sum(axis=1).cumsum()]).astype(np.int32)
    out = pa.table(
        [
            table["uid"],
            table["shard"],
            table["key"],
            verdict,
            reason,
            pa.ListArray.from_arrays(pa.array(ends), called.take(pa.array(np.nonzero(failed)[1]))),
            pa.array(np.where(kept, state.copies, 0)),
        ],
        schema=SCHEMA,
    )
    pq.write_table(out, folder / part.path.name, compression="zstd", use_dictionary=REPEATED)
    counted = out.group_by(["verdict", "reason"]).aggregate([([], "count_all")])
    return Counter({(one["verdict"], one["reason"]): one["count_all"] for one in counted.to_pylist()})


def read_column(folder: Path, part: Part, column: str) -> np.ndarray:
    """One column of the ledger's file that belongs to a part of the signals."""
    return read_columns(folder / part.path.name, [column])[column].to_numpy()
