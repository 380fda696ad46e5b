"""Keep one of each set of equal samples: the first in the pool's order, among those that survived so far.

Rows go to a bucket by a hash of their values, so equal ones meet there; the
comparison itself is of the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection.interface import Program, Shuffle, row_table
from curation.shuffle import hash_buckets


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates:
    """Samples are equal when their values of `by` are: [image_sha256], [image_sha256, caption], [url, caption], ...

    A missing value is equal to none, so a sample without a url is no copy by [url].
    """

    by: tuple[str, ...] = ("image_sha256",)
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if not self.by:
            raise UserError("exact_duplicates: by is empty; name at least one column")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.by

    def decide(self) -> Program:
        """{"dropped"}"""
        gone = yield Shuffle(self._rows, self._later, row_bytes=40 + 40 * len(self.by))
        return {"dropped": [gone]}

    def _rows(self, table: pa.Table, buckets: int) -> pa.Table:
        table = table.select([*self.by, "row"]).drop_null()
        values = zip(*(table[column].to_pylist() for column in self.by), strict=True)
        bucket = hash_buckets(hash64_many("equal values", map(repr, values)), buckets)
        return table.append_column("bucket", pa.array(bucket))

    def _later(self, pieces: Iterator[pa.Table]) -> tuple[pa.Table, None]:
        """All but the first of equal rows; of a value that fills a bucket only the first row is held."""
        firsts: pa.Table | None = None
        later = []
        for piece in pieces:
            both = piece if firsts is None else pa.concat_tables([firsts, piece.select(firsts.column_names)])
            found = both.group_by(list(self.by)).aggregate([("row", "min")])
            later.append(np.setdiff1d(both["row"].to_numpy(), found["row_min"].to_numpy(), assume_unique=True))
            firsts = found.select([*self.by, "row_min"]).rename_columns([*self.by, "row"])
        return row_table(np.concatenate(later)), None

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}
