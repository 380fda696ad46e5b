"""Keep what several scores rate highest together: SIEVE's fusion (arXiv 2310.02110, baselines/apply_filter.py).

Each column is scaled to [0, 1] by its lowest and highest value in the whole
pool, and the weighted sum decides. One pass finds the ranges; where a fraction
is asked for, a second finds the sum that it ends at. All arithmetic is float64
and element by element, so the sums do not depend on how the pool is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.fraction import Ranked, last_kept, not_after, ranked
from curation.selection.interface import Pass, numbers


@dataclass(frozen=True, kw_only=True)
class ScoreFusion:
    """The sum over `weights` (column -> weight above 0) of weight times the column's min-max scaled value. Set one:

    `fraction` in (0, 1]: int(n * fraction) of the pool stay, ties by uid (SIEVE, whose rule is DataComp's, keeps one
    more and all ties). `minimum`: sums of at least this stay; they lie in [0, sum of the weights].
    NaN and missing values count as the column's lowest, and so does every value of a constant column.
    """

    weights: dict[str, float]
    fraction: float | None = None
    minimum: float | None = None
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.minimum is None):
            raise UserError("score_fusion: set exactly one of fraction and minimum")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(f"score_fusion: fraction {self.fraction} is not in (0, 1]")
        if not self.weights:
            raise UserError("score_fusion: weights is empty; name columns with their weights")
        for column, weight in self.weights.items():
            if not 0 < weight < np.inf:
                raise UserError(f"score_fusion: weights.{column} {weight} is not a number above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights) if self.fraction is None else (*self.weights, "uid")

    def passes(self) -> Sequence[Pass]:
        ranges = Pass(self._ends, self._ranges)
        return (ranges,) if self.fraction is None else (ranges, Pass(self._ranked, self._last))

    def _ends(self, table: pa.Table, decision: Any) -> np.ndarray:
        """The lowest and the highest value of each column here: float64 [columns, 2]."""
        columns = [numbers(table, column).astype(np.float64) for column in self.weights]
        present = [values[~np.isnan(values)] for values in columns]
        return np.array([[v.min(initial=np.inf), v.max(initial=-np.inf)] for v in present])

    def _ranges(self, summaries: list[np.ndarray], decision: Any) -> dict[str, Any]:
        """{"ranges": float64 [columns, 2]}; [0, 0] for a column without any value."""
        none = np.full((len(self.weights), 2), [np.inf, -np.inf])
        of_parts = np.stack([none, *summaries])
        ends = np.stack([of_parts[..., 0].min(axis=0), of_parts[..., 1].max(axis=0)], axis=1)
        ends[ends[:, 0] > ends[:, 1]] = 0.0
        return {"ranges": ends}

    def _fused(self, table: pa.Table, ranges: np.ndarray) -> np.ndarray:
        """The weighted sums: float64 [rows], never NaN."""
        fused = np.zeros(table.num_rows)
        for (column, weight), (low, high) in zip(self.weights.items(), ranges, strict=True):
            values = numbers(table, column).astype(np.float64)
            if high > low:
                fused += weight * (np.where(np.isnan(values), 0.0, values - low) / (high - low))
        return fused

    def _ranked(self, table: pa.Table, decision: dict[str, Any]) -> Ranked:
        return ranked(self._fused(table, decision["ranges"]), table)

    def _last(self, summaries: list[Ranked], decision: dict[str, Any]) -> dict[str, Any]:
        """{"ranges", "last": the edge of what stays, as in `fraction`}"""
        return {**decision, "last": last_kept(summaries, self.fraction or 0.0)}

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        fused = self._fused(table, decision["ranges"])
        if self.minimum is not None:
            return fused >= self.minimum
        return not_after(fused, table, decision["last"])

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        last = decision.get("last")
        return {
            "ranges": dict(zip(self.weights, decision["ranges"].tolist(), strict=True)),
            "fused_minimum": self.minimum if last is None else float(last[0]),
        }
