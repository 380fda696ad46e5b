"""What a selector is: one file with a frozen dataclass of settings, and one line in `curation.selection.SELECTORS`.

A selector sees columns, one partition of the pool at a time, so that no process
holds the pool. One that needs nothing but the row has `apply` alone. One that
needs the whole pool (a quantile, the copies, the clusters) has `decide`, which
returns the decision that `apply` is given. It is a generator where it has to
ask the pool, and each answer comes back as the value of its `yield`:

    def decide(self):
        rows = yield Count()
        lowest = yield Fold(self._lowest, min)
        gone = yield Shuffle(self._rows, self._choose, row_bytes=24)
        return {"dropped": [gone]}

`Count` is how many rows are in scope. `Fold` makes a small summary of each
partition and merges them. `Shuffle` brings the rows of one bucket together from
all partitions (`curation.shuffle`) and lets each bucket find something out;
selectors that drop rows by what others hold (copies, clusters) are made of it.
`Apart` lets a worker do what needs no rows but much memory, and leave files. What is large and
has to reach every worker (centroids, a reference) stays in files, and decisions
hold what opens them.
A selector without `apply` drops the rows in its decision's "dropped".
`Warn` tells the user of what is allowed and hardly meant.

One that reads a file of the user's beside the pool has `content() -> str`, which
changes with what it reads from there ("" where that is not there yet): an
edited list makes another selection.

The tables hold the rows in scope alone (never rows with an error), with the
columns asked for and `row` (int64), the row's place in the pool's order. The
scope "pool" is every row; "survivors" are those that no earlier selector of the
recipe dropped, so that a copy that is out anyway does not shadow a good one. One
of scope "survivors" may be so only because its look at a row is dear: where its
verdict hangs on the row alone, it says `by_row`, and may be one of several
(`curation.selection.joined`).
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from curation.shuffle import Reduce, RowFiles


class Count(NamedTuple):
    """How many rows are in scope: int."""


class Warn(NamedTuple):
    """One line, which names setting, value and mend: on stderr at once, in the stage and on the page."""

    text: str


class Leaving(NamedTuple):
    """A summary, and a column for each row that the selector's later requests find in their tables."""

    summary: Any
    columns: Mapping[str, np.ndarray]


class Fold(NamedTuple):
    """`local(table)` of each partition, which may be `Leaving`, merged from left to right; None of no partitions."""

    local: Callable[[pa.Table], Any]
    merge: Callable[[Any, Any], Any]
    columns: Sequence[str] | None = None  # where it reads less than the selector `needs`


class Shuffle(NamedTuple):
    """`rows(table, buckets)` of each partition is sent to the buckets in its column `bucket`; `reduce` sees each
    bucket and returns what it found, a table with `row`, and a summary. The answer is a `RowFiles`."""

    rows: Callable[[pa.Table, int], pa.Table]
    reduce: Reduce
    row_bytes: int  # about how large a sent row is, from which follows the number of buckets
    spread: int = 1  # how many rows are sent of each
    columns: Sequence[str] | None = None
    buckets: int | None = None  # so many, whatever they hold


class Apart(NamedTuple):
    """What `work(folder)` returns, called in one worker: what takes more memory than the process that decides is to
    have. In the folder it may leave files under names of their own, which stay as long as decisions are used."""

    work: Callable[[Path], Any]


Request = Count | Fold | Shuffle | Apart | Warn
Program = Generator[Request, Any, Any]
Rows = np.ndarray | RowFiles
"""Places in the pool: int64, ascending; in one process or in the files of a shuffle."""


class Selector(Protocol):
    """Optional: `decide() -> Program | Any`, `content() -> str`, `by_row: bool`, and, instead of `apply`, a decision
    with "dropped". `recorded(said) -> Any` makes the decision again from what `describe` said of it, where that is
    all of it: so `inspect` tells what one of several (`curation.selection.joined`) says of a row."""

    scope: ClassVar[Literal["pool", "survivors"]]

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns it reads."""

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        """Which rows to keep: bool [rows]; or int32 [rows], how many copies of each."""

    def describe(self, decision: Any) -> dict[str, Any]:
        """What the manifest and the page say about the decision, as JSON; may hold "thresholds": {column: [values]}."""


def row_table(rows: np.ndarray) -> pa.Table:
    """Places as what a bucket found."""
    return pa.table({"row": pa.array(rows, pa.int64())})


def among(rows: np.ndarray, found: Sequence[Rows]) -> np.ndarray:
    """Which of these rows (int64, ascending) are in one of `found`: bool [rows]."""
    inside = np.zeros(len(rows), bool)
    if not len(rows):
        return inside
    for one in found:
        pieces: Iterable[np.ndarray]
        if isinstance(one, RowFiles):
            pieces = [table["row"].to_numpy() for table in one.between(int(rows[0]), int(rows[-1]) + 1)]
        else:
            pieces = [one[slice(*np.searchsorted(one, [rows[0], rows[-1] + 1]))]]
        for piece in pieces:
            place = np.searchsorted(rows, piece)
            place = place[place < len(rows)]
            inside[place[rows[place] == piece[: len(place)]]] = True
    return inside


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A numeric column without its nulls: those become NaN, and integers with nulls float64."""
    values = table[column]
    if values.null_count:
        # Not `safe`, which refuses whole numbers that float64 rounds.
        values = values.cast(pa.float64(), safe=False) if pa.types.is_integer(values.type) else values
    return values.to_numpy()
