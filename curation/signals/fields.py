"""Named fields of a sample's json as columns: licences, opt-outs, and what others measured (watermark, NSFW, scores).

A field is what the json says or nothing: a value of another type than the
recipe names is null, never converted, so that "0.3" is no number and a licence
of 3 no text. So is NaN, which JSON does not know and pandas writes for null, and
a number too large for its type. The one exception is JSON's own: it knows no
difference between 1 and 1.0, so whole numbers are good floats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.signals.interface import Decoded

TYPES: dict[str, tuple[pa.DataType, Any]] = {
    "string": (pa.string(), (str,)),
    "bool": (pa.bool_(), (bool,)),
    "int64": (pa.int64(), (int,)),
    "float32": (pa.float32(), (int, float)),
    "float64": (pa.float64(), (int, float)),
}
Type = Literal["string", "bool", "int64", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A column of its own name for each of `fields`, null where the json lacks it or has another type there.

    `fields`: {license: string, pwatermark: float32}; types are string, bool, int64, float32, float64.
    """

    fields: Mapping[str, Type]
    version: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.fields:
            raise UserError("fields: no field is named; write fields: {license: string}")

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {field: TYPES[kind][0] for field, kind in self.fields.items()}

    def content(self) -> dict[str, Any]:
        return {"fields": dict(self.fields)}

    def load(self, name: str) -> "Fields":
        return self

    def see(self, sample: Decoded) -> list[Any]:
        return [_finite(typed(sample.record.get(field), kind), kind) for field, kind in self.fields.items()]

    def columns(self, seen: Sequence[list[Any]]) -> dict[str, pa.Array]:
        by_field = zip(self.fields.items(), zip(*seen, strict=True), strict=True)
        return {field: pa.array(values, TYPES[kind][0]) for (field, kind), values in by_field}


def typed(value: Any, kind: Type) -> Any:
    """The value, where JSON has one of this type; else None."""
    if not isinstance(value, TYPES[kind][1]) or isinstance(value, bool) != (kind == "bool"):
        return None
    found: Any = value
    if kind == "string":
        return found.encode("utf-8", "replace").decode()  # json may hold half a surrogate pair, Arrow may not
    if kind == "int64":
        return found if -(2**63) <= found < 2**63 else None
    if kind == "bool":
        return found
    try:
        return float(found)
    except OverflowError:  # a whole number of more than 308 digits
        return None


def _finite(value: Any, kind: Type) -> Any:
    if kind not in ("float32", "float64") or value is None:
        return value
    return value if abs(value) <= float(np.finfo(kind).max) else None
