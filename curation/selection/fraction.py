"""Keep the highest fraction of a column, as DataComp counts it or exactly (`curation.selection.ranking`).

n is the whole pool, whatever other selectors drop, because DataComp intersects its filters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Program, numbers
from curation.selection.ranking import Edge, as_said, highest, said_of, stays


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

    def decide(self) -> Program:
        return highest(self._values, self.fraction, self.mode)

    def _values(self, table: pa.Table) -> np.ndarray:
        return numbers(table, self.column)

    def apply(self, table: pa.Table, decision: Edge | None) -> np.ndarray:
        return stays(self._values(table), table, decision)

    def describe(self, decision: Edge | None) -> dict[str, Any]:
        if decision is None:
            return {}
        return {"thresholds": {self.column: [float(decision.value)]}, **said_of(decision)}

    def recorded(self, said: Mapping[str, Any]) -> Edge | None:
        return as_said(said.get("thresholds", {}).get(self.column, [None])[0], said)
