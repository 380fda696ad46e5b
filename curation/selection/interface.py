"""What a selector is: one file with a frozen dataclass of settings, and one line in `curation.selection.SELECTORS`.

A selector sees columns, one part of the pool at a time, so that no process
holds the pool. One that needs nothing but the row has no passes: `apply` is
all. One that needs the whole pool (a quantile, the copies, the clusters) says
so in passes: in each, `local` makes a small summary of every part and `decide`
turns all summaries into a decision, which the next pass and at last `apply`
are given.

One that reads a file of the user's beside the pool has `content() -> str`, which
changes with what it reads from there ("" where that is not there yet): an
edited list makes another selection.

The tables hold the rows in scope alone (never rows with an error), with the
columns asked for and `row` (int64), the row's place in the pool's order. The
scope "pool" is every row; "survivors" are those that no earlier selector of the
recipe dropped, so that a copy that is out anyway does not shadow a good one.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa


class Pass(NamedTuple):
    """`local(table, decision so far) -> summary`, then `decide(summaries, decision so far) -> decision`."""

    local: Callable[[pa.Table, Any], Any]
    decide: Callable[[list[Any], Any], Any]


class Selector(Protocol):
    scope: ClassVar[Literal["pool", "survivors"]]

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns it reads."""

    def passes(self) -> Sequence[Pass]:
        """Empty where a row decides for itself."""

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        """Which rows to keep: bool [rows]."""

    def describe(self, decision: Any) -> dict[str, Any]:
        """What the manifest and the page say about the decision, as JSON; may hold "thresholds": {column: [values]}."""


def dropped_rows(table: pa.Table, dropped: np.ndarray) -> np.ndarray:
    """Which rows of the table are not among `dropped` (int64, sorted): bool [rows]."""
    rows = table["row"].to_numpy()
    place = np.searchsorted(dropped, rows)
    found = np.zeros(len(rows), bool)
    inside = place < len(dropped)
    found[inside] = dropped[place[inside]] == rows[inside]
    return ~found


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A numeric column without its nulls: those become NaN, and integers with nulls float64."""
    values = table[column]
    if values.null_count:
        values = values.cast(pa.float64()) if pa.types.is_integer(values.type) else values
    return values.to_numpy()
