"""Keep one of each set of equal samples: the first in the pool's order, among those that survived so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.selection.interface import Pass, dropped_rows


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates:
    """Samples are equal when their values of `by` are: [image_sha256], [image_sha256, caption], [url, caption], ...

    A missing value is equal to none, so a sample without a url is no copy by [url].
    """

    by: tuple[str, ...] = ("image_sha256",)
    scope: ClassVar[Literal["survivors"]] = "survivors"

    @property
    def needs(self) -> tuple[str, ...]:
        return self.by

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._local, self._decide),)

    def _local(self, table: pa.Table, decision: Any) -> pa.Table:
        return table.select([*self.by, "row"]).drop_null()

    def _decide(self, summaries: list[pa.Table], decision: Any) -> np.ndarray:
        """The rows to drop: int64, sorted."""
        table = pa.concat_tables(summaries)
        firsts = table.group_by(list(self.by)).aggregate([("row", "min")])["row_min"].to_numpy()
        return np.setdiff1d(table["row"].to_numpy(), firsts, assume_unique=True)

    def apply(self, table: pa.Table, decision: np.ndarray) -> np.ndarray:
        return dropped_rows(table, decision)

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}
