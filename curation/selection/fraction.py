"""Keep the highest fraction of a column, as DataComp counts it or exactly.

`datacomp`: the threshold is `sorted descending [int(n * fraction)]` and all at
least as high stay, which is n + 1 and ties (DataComp's own arithmetic; its
IndexError at fraction 1 is all here). `exact`: int(n * fraction) stay, ties by uid
and then by place. n is the whole
pool, whatever other selectors drop, because DataComp intersects its filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Pass, numbers


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
        return values if self.mode == "datacomp" else (values, table["uid"], table["row"].to_numpy())

    def _decide(self, summaries: list[Any], decision: Any) -> Any:
        """datacomp: the threshold. exact: (value, uid, row) of the last that stays. None: nothing stays."""
        if self.mode == "datacomp":
            values = np.concatenate(summaries) if summaries else np.zeros(0)
            if not len(values):
                return None
            descending = np.sort(np.where(np.isnan(values), -np.inf, values))[::-1]
            return descending[min(int(len(values) * self.fraction), len(values) - 1)]
        values = np.concatenate([s[0] for s in summaries]) if summaries else np.zeros(0)
        count = int(len(values) * self.fraction)
        if not count:
            return None
        uids = pa.chunked_array([c for s in summaries for c in s[1].chunks], pa.string())
        rows = np.concatenate([s[2] for s in summaries])
        order = np.argsort(-values, kind="stable")  # NaN sorts last
        edge = values[order[count - 1]]
        if np.isnan(edge):
            return (-np.inf, "", 0)
        above = int((values > edge).sum())
        ties = np.flatnonzero(values == edge)
        ranked = sorted(zip(uids.take(pa.array(ties)).to_pylist(), rows[ties].tolist(), strict=True))
        return (edge, *ranked[count - above - 1])

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = numbers(table, self.column)
        if decision is None:
            return np.zeros(len(values), bool)
        if self.mode == "datacomp":
            return values >= decision
        edge, uid, row = decision
        keep = values > edge
        for i in np.flatnonzero(values == edge):
            keep[i] = (table["uid"][i].as_py(), table["row"][i].as_py()) <= (uid, row)
        return keep

    def describe(self, decision: Any) -> dict[str, Any]:
        if decision is None:
            return {}
        return {"thresholds": {self.column: [float(decision if self.mode == "datacomp" else decision[0])]}}
