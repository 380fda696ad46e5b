"""Keep rows by the value of one column: licences that are allowed, opt-outs, labels of a service, booleans.

Few values, written in the recipe itself; for long lists of uids, hashes, urls
or domains there is `block_list`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Values:
    """Keep rows whose `column` is one of `allow`, or, with `deny`, is none of these.

    Text is compared whole, with its case unless `ignore_case`. A missing value is dropped by `allow` and kept by
    `deny`, unless `missing` says otherwise.
    """

    column: str
    allow: list[str | int | bool] = field(default_factory=list)
    deny: list[str | int | bool] = field(default_factory=list)
    ignore_case: bool = False
    missing: Literal["drop", "keep"] | None = None
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if bool(self.allow) == bool(self.deny):
            raise UserError(f"values on {self.column}: set exactly one of allow and deny, to at least one value")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, kind: pa.DataType) -> None:
        """Whether a column of this type can be equal to the values.

        Raises:
            UserError: it cannot.
        """
        if pa.types.is_string(kind):
            wanted: type = str
        elif pa.types.is_boolean(kind):
            wanted = bool
        elif pa.types.is_integer(kind):
            wanted = int
        else:
            raise UserError(f"values on {self.column}: it is {kind}; name a column of text, whole numbers or booleans")
        for value in (*self.allow, *self.deny):
            if type(value) is not wanted:
                raise UserError(f"values on {self.column}: {value!r} is no {wanted.__name__}, as that column holds")
            try:
                pa.scalar(value, kind)
            except (pa.ArrowInvalid, OverflowError):
                raise UserError(f"values on {self.column}: no {kind} is {value}; name a value that fits") from None

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = table[self.column]
        listed = pa.array([*self.allow, *self.deny], values.type)
        if self.ignore_case and pa.types.is_string(values.type):
            values, listed = pc.utf8_lower(values), pc.utf8_lower(listed)
        named = pc.is_in(values, value_set=listed).to_numpy()
        keep = named if self.allow else ~named
        if self.missing is not None:
            keep = np.where(values.is_null().to_numpy(), self.missing == "keep", keep)
        return keep

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}
