"""Keep what several scores rate highest together: SIEVE's fusion (arXiv 2310.02110, baselines/apply_filter.py).

Each column is scaled to [0, 1] by its lowest and highest value in the whole
pool, and the weighted sum decides. First the ranges are found; where a fraction
is asked for, the sum that it ends at. All arithmetic is float64 and element by
element, so the sums do not depend on how the pool is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.selection.interface import Fold, Program, numbers
from curation.selection.ranking import as_said, highest, said_of, stays


@dataclass(frozen=True, kw_only=True)
class ScoreFusion:
    """The sum over `weights` (column -> weight above 0) of weight times the column's min-max scaled value. Set one:

    `fraction` in (0, 1]: the highest of the pool, counted as in `mode` (SIEVE has DataComp's rule).
    `minimum`: sums of at least this stay; they lie in [0, sum of the weights].
    NaN and missing values count as the column's lowest, and so does every value of a constant column; infinite ones as
    its finite ends.
    """

    weights: dict[str, float]
    fraction: float | None = None
    minimum: float | None = None
    mode: Literal["datacomp", "exact"] = "datacomp"
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
        if self.minimum is not None and not self.minimum <= sum(self.weights.values()):
            raise UserError(f"score_fusion: no sum reaches minimum {self.minimum}; set at most the sum of the weights")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights) if self.fraction is None else (*self.weights, "uid")

    def decide(self) -> Program:
        """{"ranges": float64 [columns, 2], "edge": where the fraction ends}"""
        ends = yield Fold(self._ends, _wider)
        ranges = np.zeros((len(self.weights), 2)) if ends is None else np.where(ends[:, :1] > ends[:, 1:], 0.0, ends)
        if self.fraction is None:
            return {"ranges": ranges, "edge": None}
        edge = yield from highest(partial(self._fused, ranges), self.fraction, self.mode)
        return {"ranges": ranges, "edge": edge}

    def _ends(self, table: pa.Table) -> np.ndarray:
        """The lowest and the highest value of each column here: float64 [columns, 2]."""
        columns = [numbers(table, column).astype(np.float64) for column in self.weights]
        present = [values[np.isfinite(values)] for values in columns]
        return np.array([[v.min(initial=np.inf), v.max(initial=-np.inf)] for v in present])

    def _fused(self, ranges: np.ndarray, table: pa.Table) -> np.ndarray:
        """The weighted sums: float64 [rows], never NaN."""
        fused = np.zeros(table.num_rows)
        for (column, weight), (low, high) in zip(self.weights.items(), ranges, strict=True):
            values = numbers(table, column).astype(np.float64)
            if high > low:
                scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
                fused += weight * np.where(np.isnan(values), 0.0, scaled)
        return fused

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        fused = self._fused(decision["ranges"], table)
        return stays(fused, table, decision["edge"]) if self.minimum is None else fused >= self.minimum

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        edge = decision["edge"]
        return {
            "ranges": dict(zip(self.weights, decision["ranges"].tolist(), strict=True)),
            "fused_minimum": self.minimum if edge is None else float(edge.value),
            **said_of(edge),
        }

    def recorded(self, said: Mapping[str, Any]) -> dict[str, Any]:
        ranges = np.array([said["ranges"][column] for column in self.weights], np.float64)
        return {"ranges": ranges, "edge": None if self.fraction is None else as_said(said["fused_minimum"], said)}


def _wider(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The range that holds both, by column; [inf, -inf] holds nothing."""
    return np.stack([np.minimum(a[:, 0], b[:, 0]), np.maximum(a[:, 1], b[:, 1])], axis=1)
