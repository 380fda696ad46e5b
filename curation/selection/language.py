"""Keep captions in some languages, by fastText's first guess."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.selection.interface import numbers


@dataclass(frozen=True, kw_only=True)
class LanguageIs:
    """`languages`: codes of lid.176. `min_probability` also drops what fastText is unsure of, short captions first."""

    languages: list[str]
    min_probability: float = 0.0
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not self.languages:
            raise UserError("language: languages is empty; name at least one code such as en")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("language", "language_probability")

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        named = pc.is_in(table["language"], value_set=pa.array(self.languages)).to_numpy()
        return named & (numbers(table, "language_probability") >= np.float32(self.min_probability))

    def describe(self, decision: Any) -> dict[str, Any]:
        return {"thresholds": {"language_probability": [self.min_probability]} if self.min_probability else {}}
