"""Selection as the tests run it: in partitions so small that a pool has several, and read back whole."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation import shuffle
from curation.selection import engine
from curation.selection.engine import Part
from curation.selection.interface import Selector

PARTITION_ROWS = 2_000
BUCKET_BYTES = 20_000
DIRECT, MERGED = 16, 8  # so that shuffles go the ways of a large pool, too


@dataclass(frozen=True, kw_only=True)
class Selected:
    """`valid` bool [rows], `failed` bool [rows, selectors], `copies` int32 [rows]: of the whole pool."""

    valid: np.ndarray
    failed: np.ndarray
    copies: np.ndarray
    stages: list[dict[str, Any]]


def select(
    selectors: Mapping[str, Selector],
    parts: Sequence[Part],
    partition_rows: int = PARTITION_ROWS,
    bucket_bytes: int = BUCKET_BYTES,
) -> Selected:
    before = shuffle.BUCKET_BYTES, shuffle.DIRECT, shuffle.MERGED
    shuffle.BUCKET_BYTES, shuffle.DIRECT, shuffle.MERGED = bucket_bytes, DIRECT, MERGED
    try:
        with tempfile.TemporaryDirectory() as folder:
            pool = engine.partitions(parts, partition_rows)
            selection = engine.run(selectors, pool, Path(folder))
            states = [selection.state(partition) for partition in pool]
    finally:
        shuffle.BUCKET_BYTES, shuffle.DIRECT, shuffle.MERGED = before
    return Selected(
        valid=np.concatenate([state.valid for state in states]),
        failed=np.concatenate([state.failed for state in states]),
        copies=np.concatenate([state.copies for state in states]),
        stages=selection.stages,
    )
