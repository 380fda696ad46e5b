"""What the meters of a unit see, batch by batch, becomes columns; what one sample breaks is that sample's error.

Fixed batches of samples become columns at once. Where a meter fails, in `see` or
in `columns`, the batch is halved down to the samples that it cannot digest: these
are error rows, "signal_failed", and the others have their values. A float that is
no number, alone or in a vector, is an error too, "not_finite": it would fail each
selector in another way, and no budget would count it. A null is none: by that a
signal says that a sample has no value.

What is not the sample's fault (a recipe's mistake, a disk, memory) is raised.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError, one_line
from curation.signals.interface import Decoded, Meter, Signal
from curation.store import NOT_FINITE, SIGNAL_FAILED

BATCH = 64  # samples that a meter turns into columns at once
OF_A_GPU = ("OutOfMemoryError", "AcceleratorError")  # PyTorch's, which is imported only where it is used


class Gathering:
    """The columns of some signals of one unit, as they come to be.

    `errors`: by row of the unit, its reason. `causes`: by reason, (row, what happened in one line) of the first.
    """

    def __init__(self, meters: Mapping[str, Meter], signals: Mapping[str, Signal]) -> None:
        self.errors: dict[int, str] = {}
        self.causes: dict[str, tuple[int, str]] = {}
        self._meters = meters
        self._schemas = {name: signals[name].schema(name) for name in meters}
        self._waiting: list[int] = []  # rows whose samples were seen since the last batch
        self._seen: dict[str, list[Any]] = {name: [] for name in meters}
        self._rows: list[int] = []  # rows in the order of the batches
        self._batches: dict[str, list[dict[str, pa.Array]]] = {name: [] for name in meters}

    def see(self, row: int, sample: Decoded) -> None:
        """Show a sample to all meters; it belongs to this row of the unit."""
        looked = {}
        for name, meter in self._meters.items():
            try:
                looked[name] = meter.see(sample)
            except Exception as reason:
                self._failed(name, row, reason)
                return
        for name, value in looked.items():
            self._seen[name].append(value)
        self._waiting.append(row)
        if len(self._waiting) == BATCH:
            self.flush()

    def flush(self) -> None:
        """Turn what waits into columns; also after the last sample."""
        for name in self._meters if self._waiting else ():
            made = self._made(name, self._seen[name], self._waiting)
            for column, values in made.items():
                for place in np.flatnonzero(not_finite(values)):
                    self._failing(self._waiting[place], NOT_FINITE, f"signal {name}: {column} is NaN or infinite")
            self._batches[name].append(made)
            self._seen[name] = []
        self._rows += self._waiting
        self._waiting = []

    def column(self, name: str, column: str, valid: np.ndarray) -> pa.Array:
        """A column of signal `name` for all rows of the unit, null where `valid` (bool [rows]) is not."""
        if not self._batches[name]:
            return pa.nulls(len(valid), self._schemas[name][column])
        places = np.zeros(len(valid), np.int64)
        places[self._rows] = np.arange(len(self._rows))
        return pa.concat_arrays([batch[column] for batch in self._batches[name]]).take(pa.array(places, mask=~valid))

    def _made(self, name: str, seen: Sequence[Any], rows: Sequence[int]) -> dict[str, pa.Array]:
        """The columns of these rows, null where the meter fails on one alone."""
        schema = self._schemas[name]
        try:
            given = self._meters[name].columns(seen)
            made = {column: given[column] for column in schema}
            for column, values in made.items():
                if len(values) != len(rows) or values.type != schema[column]:
                    raise ValueError(
                        f"column {column}: {len(values)} of {values.type}, not {len(rows)} of {schema[column]}"
                    )
            return made
        except Exception as reason:
            raise_unless_of_a_sample(name, reason)
            if len(rows) == 1:
                self._failed(name, rows[0], reason)
                return {column: pa.nulls(1, kind) for column, kind in schema.items()}
        half = len(rows) // 2
        parts = self._made(name, seen[:half], rows[:half]), self._made(name, seen[half:], rows[half:])
        return {column: pa.concat_arrays([part[column] for part in parts]) for column in schema}

    def _failed(self, name: str, row: int, reason: Exception) -> None:
        raise_unless_of_a_sample(name, reason)
        self._failing(row, SIGNAL_FAILED, f"signal {name}: {type(reason).__name__}: {one_line(reason)}")

    def _failing(self, row: int, reason: str, cause: str) -> None:
        if reason == SIGNAL_FAILED or row not in self.errors:  # in whatever order the recipe has its signals
            self.errors[row] = reason
        self.causes.setdefault(reason, (row, cause))


def raise_unless_of_a_sample(name: str, reason: Exception) -> None:
    """Raise what is not the fault of one sample. A library that finds a picture broken raises OSError without a number,
    a disk one with it."""
    if type(reason).__name__ in OF_A_GPU:
        raise UserError(
            f"signal {name}: the GPU has failed ({one_line(reason)}); run again with fewer --workers, or device: cpu"
        ) from reason
    if isinstance(reason, UserError | MemoryError) or (isinstance(reason, OSError) and reason.errno is not None):
        raise reason


def not_finite(values: pa.Array) -> np.ndarray:
    """Which rows hold a float that is NaN or infinite, alone or in lists of any depth: bool [rows]."""
    kind = values.type
    if pa.types.is_floating(kind):
        return ~np.isfinite(values.to_numpy(zero_copy_only=False)) & values.is_valid().to_numpy(zero_copy_only=False)
    found = np.zeros(len(values), bool)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        found[np.repeat(np.arange(len(values)), lengths)[not_finite(values.flatten())]] = True
    return found
