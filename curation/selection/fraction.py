"""Keep the highest fraction of a column, as DataComp counts it or exactly.

`datacomp`: the threshold is `sorted descending [int(n * fraction)]` and all at
least as high stay, which is n + 1 and ties (DataComp's own arithmetic; its
IndexError at fraction 1 is all here). `exact`: int(n * fraction) stay, ties by uid
and then by place. n is the whole
pool, whatever other selectors drop, because DataComp intersects its filters.
The exact rule is functions, since scores that are no column rank by it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Pass, numbers

Ranked = tuple[np.ndarray, pa.ChunkedArray, np.ndarray]
"""What ranks the rows of a part: (values [rows], uids, rows int64 [rows])"""
Edge = tuple[float, str, int]
"""(value, uid, row) of the last that stays"""


@dataclass(frozen=True, kw_only=True)
class Fraction:
    """The highest `fraction` in (0, 1] of `column`; NaN and missing values count as the lowest and are dropped."""

    column: str
    fraction: float
    mode: Literal["datacomp", "exact"] = "datacomp"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction of {self.column}: {self.fraction} is not in (0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,) if self.mode == "datacomp" else (self.column, "uid")

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._local, self._decide),)

    def _local(self, table: pa.Table, decision: Any) -> Any:
        values = numbers(table, self.column)
        return values if self.mode == "datacomp" else ranked(values, table)

    def _decide(self, summaries: list[Any], decision: Any) -> Any:
        """datacomp: the threshold. exact: (value, uid, row) of the last that stays. None: nothing stays."""
        if self.mode == "datacomp":
            values = np.concatenate(summaries) if summaries else np.zeros(0)
            if not len(values):
                return None
            descending = np.sort(np.where(np.isnan(values), -np.inf, values))[::-1]
            return descending[min(int(len(values) * self.fraction), len(values) - 1)]
        return last_kept(summaries, self.fraction)

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = numbers(table, self.column)
        if self.mode == "exact":
            return not_after(values, table, decision)
        return np.zeros(len(values), bool) if decision is None else values >= decision

    def describe(self, decision: Any) -> dict[str, Any]:
        if decision is None:
            return {}
        return {"thresholds": {self.column: [float(decision if self.mode == "datacomp" else decision[0])]}}


def ranked(values: np.ndarray, table: pa.Table) -> Ranked:
    """The values (float [rows]) of the table's rows with what breaks their ties."""
    return values, table["uid"], table["row"].to_numpy()


def last_kept(parts: list[Ranked], fraction: float) -> Edge | None:
    """The last of the int(n * fraction) highest of all parts, ties by uid and then by row; None where nothing stays.

    NaN counts as the lowest and never stays.
    """
    values = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0)
    count = int(len(values) * fraction)
    if not count:
        return None
    uids = pa.chunked_array([c for p in parts for c in p[1].chunks], pa.string())
    rows = np.concatenate([p[2] for p in parts])
    order = np.argsort(-values, kind="stable")  # NaN sorts last
    edge = values[order[count - 1]]
    if np.isnan(edge):
        return (-np.inf, "", 0)
    above = int((values > edge).sum())
    ties = np.flatnonzero(values == edge)
    by_uid = sorted(zip(uids.take(pa.array(ties)).to_pylist(), rows[ties].tolist(), strict=True))
    return (edge, *by_uid[count - above - 1])


def not_after(values: np.ndarray, table: pa.Table, last: Edge | None) -> np.ndarray:
    """Which rows of the table rank no later than the last that stays: bool [rows]."""
    if last is None:
        return np.zeros(len(values), bool)
    edge, uid, row = last
    keep = values > edge
    for i in np.flatnonzero(values == edge):
        keep[i] = (table["uid"][i].as_py(), table["row"][i].as_py()) <= (uid, row)
    return keep
