"""The edge of the highest fraction of all values in the pool, exact and without holding them.

A radix search: 16 bits of the values at a time are counted, and the bin that
holds the wanted rank is counted on, until few enough distinct values are left
to be listed. Two rounds over the pool do for some ten million rows, three for
billions. Both ways to count are here: DataComp's, whose threshold is
`sorted descending [int(n * fraction)]` and keeps all at least as high (n + 1 and
ties; its IndexError at fraction 1 is all here), and the exact one, where
int(n * fraction) stay, ties by uid and then by place.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.selection.interface import Count, Fold, Program

Values = Callable[[pa.Table], np.ndarray]
"""Of each row of a table a number; NaN counts as the lowest and never stays."""
LISTED = 1 << 18  # so many values are listed rather than counted
BITS = 16


class Edge(NamedTuple):
    """The last that stays; without a uid, all of its value do."""

    value: float
    uid: str | None = None
    row: int = 0


def highest(values: Values, fraction: float, mode: Literal["datacomp", "exact"]) -> Program:
    """A program that returns the Edge of the highest `fraction` in (0, 1], or None where nothing stays."""
    rows = yield Count()
    wanted = min(int(rows * fraction), rows - 1) if mode == "datacomp" else int(rows * fraction) - 1
    if wanted < 0:
        return None
    value, above, ties = yield from _at_rank(values, wanted, rows)
    if mode == "datacomp" or (above + ties == wanted + 1 and value > -np.inf):
        return Edge(value)
    if value == -np.inf:
        return Edge(value, "")
    count = wanted + 1 - above
    tied = yield Fold(partial(_tied, values, value, count), partial(_first_by_uid, count))
    return Edge(value, tied["uid"][-1].as_py(), tied["row"][-1].as_py())


def stays(values: np.ndarray, table: pa.Table, edge: Edge | None) -> np.ndarray:
    """Which rows of the table rank no later than the edge: bool [rows]."""
    if edge is None:
        return np.zeros(len(values), bool)
    keep = values > edge.value
    ties = np.flatnonzero(values == edge.value)
    if edge.uid is not None and len(ties):
        tied = table.select(["uid", "row"]).take(pa.array(ties))
        same = pc.and_(pc.equal(tied["uid"], edge.uid), pc.less_equal(tied["row"], edge.row))
        ties = ties[pc.or_(pc.less(tied["uid"], edge.uid), same).to_numpy()]
    keep[ties] = True
    return keep


def said_of(edge: Edge | None) -> dict[str, Any]:
    """What a manifest says of an edge beside its value: where its ties end, if they do."""
    return {} if edge is None or edge.uid is None else {"last": [edge.uid, edge.row]}


def as_said(value: float | None, said: Mapping[str, Any]) -> Edge | None:
    """The edge of this value of which `said_of` said that."""
    return None if value is None else Edge(value, *said.get("last", ()))


def _at_rank(values: Values, rank: int, rows: int) -> Program:
    """(the value at this place of the descending order, how many are above it, how many equal it)"""
    prefix, depth, above = 0, 0, 0
    while rows > LISTED and depth < 64 // BITS:
        counts = yield Fold(partial(_counted, values, prefix, depth), partial(np.add, dtype=np.int64))
        running = np.cumsum(counts[::-1])  # from the highest bin down
        place = int(np.searchsorted(running, rank - above, side="right"))
        above += int(running[place] - counts[::-1][place])
        rows = int(counts[::-1][place])
        prefix = prefix << BITS | (len(counts) - 1 - place)
        depth += 1
    keys, counts = yield Fold(partial(_listed, values, prefix, depth), _merged)
    running = np.cumsum(counts[::-1])
    place = int(np.searchsorted(running, rank - above, side="right"))
    ties = int(counts[::-1][place])
    return float(_values(keys[::-1][place : place + 1])[0]), above + int(running[place]) - ties, ties


def _keys(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the values, NaN as the lowest: uint64 [n]."""
    exact = np.where(np.isnan(values), -np.inf, values).astype(np.float64) + 0.0  # no negative zero
    bits = exact.view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _values(keys: np.ndarray) -> np.ndarray:
    """What `_keys` was given: float64 [n]."""
    return np.where(keys >> np.uint64(63), keys ^ np.uint64(1 << 63), ~keys).view(np.float64)


def _under(values: Values, prefix: int, depth: int, table: pa.Table) -> np.ndarray:
    """The keys whose first `depth` digits are `prefix`."""
    keys = _keys(values(table))
    return keys[keys >> np.uint64(64 - BITS * depth) == prefix] if depth else keys


def _counted(values: Values, prefix: int, depth: int, table: pa.Table) -> np.ndarray:
    """uint32 [2^BITS], since every partition sends one to the process that decides."""
    digits = _under(values, prefix, depth, table) >> np.uint64(64 - BITS * (depth + 1))
    return np.bincount((digits & np.uint64((1 << BITS) - 1)).astype(np.int64), minlength=1 << BITS).astype(np.uint32)


def _listed(values: Values, prefix: int, depth: int, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(_under(values, prefix, depth, table), return_counts=True)


def _merged(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    keys, place = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    return keys, np.bincount(place, np.concatenate([a[1], b[1]])).astype(np.int64)


def _tied(values: Values, value: float, count: int, table: pa.Table) -> pa.Table:
    ties = table.select(["uid", "row"]).filter(pa.array(values(table) == value))
    return ties.sort_by([("uid", "ascending"), ("row", "ascending")]).slice(0, count)


def _first_by_uid(count: int, a: pa.Table, b: pa.Table) -> pa.Table:
    return pa.concat_tables([a, b]).sort_by([("uid", "ascending"), ("row", "ascending")]).slice(0, count)
