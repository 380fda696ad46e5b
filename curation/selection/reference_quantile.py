"""Keep what scores at least a quantile of trusted pairs: a data-filtering network's threshold without a guess.

The trusted pairs are measured with the same recipe (`gemsmith curate --phase
measure --pool TRUSTED --out REFERENCE`). A score of another model on that side
would mean nothing, so the signal's identity is compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import config_hash
from curation.manifest import read_manifest
from curation.selection.interface import Fold, Program, numbers
from curation.selection.threshold import in_precision


@dataclass(frozen=True, kw_only=True)
class ReferenceQuantile:
    """Keep `column` >= the `quantile` (in [0, 1]) of that column in `reference`, an OUT folder with a finished measure.

    The quantile is a value of the reference itself (numpy's "lower").
    """

    column: str
    reference: str
    quantile: float
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise UserError(f"reference_quantile of {self.column}: quantile {self.quantile} is not in [0, 1]")

    def content(self) -> str:
        return reference_content(self.reference)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def decide(self) -> Program:
        """float"""
        measured = yield Fold(self._identity, set.union)
        parts = read_reference(self.reference, self.needs, measured or set())
        values = [numbers(part, self.column) for part in parts]
        scores = np.concatenate(values) if values else np.zeros(0)
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            raise UserError(f"reference {self.reference}: holds no {self.column}; measure some trusted pairs")
        return float(np.quantile(scores, self.quantile, method="lower"))

    def _identity(self, table: pa.Table) -> set[tuple[bytes, ...]]:
        return {identities(table.schema, self.needs)}

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = numbers(table, self.column)
        return values >= in_precision(decision, values)

    def describe(self, decision: Any) -> dict[str, Any]:
        return {"thresholds": {self.column: [decision]}}

    def recorded(self, said: Mapping[str, Any]) -> float:
        return float(said["thresholds"][self.column][0])


def reference_content(reference: str) -> str:
    """By the names of what was measured, which change with shards and signals: the files may be large."""
    manifest = read_manifest(Path(reference) / "measure.manifest.json")
    return config_hash([Path(manifest["signal_set"]).name, manifest["parts"]]) if manifest else ""


def identities(schema: pa.Schema, columns: Sequence[str]) -> tuple[bytes, ...]:
    """What says of each column which signal, of which model and settings, made it; b"" where there is no column."""
    fields = [schema.field(column) if column in schema.names else None for column in columns]
    return tuple(((field and field.metadata) or {}).get(b"identity", b"") for field in fields)


def read_reference(reference: str, columns: Sequence[str], measured: set[tuple[bytes, ...]]) -> Iterator[pa.Table]:
    """The columns of a finished measure in the OUT folder `reference`, a table a part; rows with an error are null.

    Args:
        measured: the `identities` of the parts of the pool, which the reference has to share.

    Raises:
        UserError: no finished measure is there, or it was made otherwise.
    """
    manifest = read_manifest(Path(reference) / "measure.manifest.json")
    if manifest is None:
        raise UserError(
            f"reference {reference}: no finished measure there; run `gemsmith curate --phase measure` "
            "on the reference with this recipe first"
        )
    for part in manifest["parts"]:
        path = Path(reference) / manifest["signal_set"] / part
        found = identities(pq.read_schema(path), columns)
        if {found} != measured:
            other = next((c for n, c in enumerate(columns) if any(found[n] != m[n] for m in measured)), columns[0])
            raise UserError(
                f"reference {reference}: its {other} was not measured by the same model and settings; "
                "measure it again with this recipe"
            )
        yield pq.read_table(path, columns=list(columns))
