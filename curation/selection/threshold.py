"""Keep rows whose column lies between two bounds, both inclusive: lengths, sizes, aspect, CLIPScore, ..."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import numbers


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """`min` <= column <= `max`; a missing or NaN value is dropped unless `missing` is "keep".

    Bounds are compared in the column's own precision, as DataComp's scripts do.
    """

    column: str
    min: float | None = None
    max: float | None = None
    missing: Literal["drop", "keep"] = "drop"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise UserError(f"threshold on {self.column}: neither min nor max is set; set one")
        low, high = (-np.inf if self.min is None else self.min), (np.inf if self.max is None else self.max)
        if not low <= high:  # NaN too
            raise UserError(f"threshold on {self.column}: nothing lies between min {low} and max {high}")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = numbers(table, self.column)
        keep = np.ones(len(values), bool)
        if self.min is not None:
            keep &= values >= in_precision(self.min, values)
        if self.max is not None:
            keep &= values <= in_precision(self.max, values)
        if self.missing == "keep":
            keep |= np.isnan(values)
        return keep

    def describe(self, decision: Any) -> dict[str, Any]:
        return {"thresholds": {self.column: [bound for bound in (self.min, self.max) if bound is not None]}}


def in_precision(bound: float, values: np.ndarray) -> Any:
    """The bound as a number of the column's own type where that is a float, else as it is."""
    return values.dtype.type(bound) if np.issubdtype(values.dtype, np.floating) else bound
