"""The ledger: one row for every sample seen, with its verdict and every reason against it.

One parquet file for each part of the signals, in the same order, so the two can
be read side by side. The folder appears by a rename when all of it is written.
"""

import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.selection.engine import MapParts, Part, Selection

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("verdict", pa.string()),  # kept | dropped | error
        ("reason", pa.string()),  # the first selector that dropped it, or the error
        ("failed", pa.list_(pa.string())),  # all selectors that would have dropped it
        ("copies", pa.int32()),  # how often it is in the shards
    ]
)


def write_ledger(
    folder: Path, parts: Sequence[Part], selection: Selection, map_parts: MapParts = map
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
    work = list(zip(parts, selection.valid, selection.failed, strict=True))
    counts: Counter[tuple[str, str | None]] = Counter()
    for counted in map_parts(partial(_write_part, temporary, names), work):
        counts.update(counted)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return {
        "seen": counts.total(),
        "kept": sum(n for (verdict, _), n in counts.items() if verdict == "kept"),
        "dropped": {name: counts["dropped", name] for name in names if counts["dropped", name]},
        "errors": {str(reason): n for (verdict, reason), n in sorted(counts.items(), key=str) if verdict == "error"},
    }


def _write_part(
    folder: Path, names: list[str], item: tuple[Part, np.ndarray, np.ndarray]
) -> Counter[tuple[str, str | None]]:
    part, valid, failed = item
    table = pq.read_table(part.path, columns=["uid", "shard", "key", "error"])
    kept = valid & ~failed.any(axis=1)
    verdicts = np.where(valid, np.where(kept, "kept", "dropped"), "error")
    first = failed.argmax(axis=1) if names else np.zeros(part.rows, int)
    errors = table["error"].to_pylist()
    reasons = [
        None if k else names[f] if v else error for k, v, f, error in zip(kept, valid, first, errors, strict=True)
    ]
    lists: Iterable[list[str]] = ([names[s] for s in np.flatnonzero(row)] for row in failed)
    out = pa.table(
        [
            table["uid"],
            table["shard"],
            table["key"],
            pa.array(verdicts.tolist()),
            pa.array(reasons, pa.string()),
            pa.array(list(lists), pa.list_(pa.string())),
            pa.array(kept.astype(np.int32)),
        ],
        schema=SCHEMA,
    )
    pq.write_table(out, folder / part.path.name, compression="zstd")
    return Counter(zip(verdicts.tolist(), reasons, strict=True))


def read_column(folder: Path, part: Part, column: str) -> np.ndarray:
    """One column of the ledger's file that belongs to a part of the signals."""
    return pq.read_table(folder / part.path.name, columns=[column])[column].to_numpy()
