"""Keep what scores at least a quantile of trusted pairs: a data-filtering network's threshold without a guess.

The trusted pairs are measured with the same recipe (`gemsmith curate --phase
measure --pool TRUSTED --out REFERENCE`). A score of another model on that side
would mean nothing, so the signal's identity is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import config_hash
from curation.manifest import read_manifest
from curation.selection.interface import Pass, numbers
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
        """By the names of what was measured, which change with shards and signals: the files may be large."""
        manifest = read_manifest(Path(self.reference) / "measure.manifest.json")
        return config_hash([Path(manifest["signal_set"]).name, manifest["parts"]]) if manifest else ""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def passes(self) -> Sequence[Pass]:
        return (Pass(self._local, self._decide),)

    def _local(self, table: pa.Table, decision: Any) -> bytes:
        return (table.schema.field(self.column).metadata or {}).get(b"identity", b"")

    def _decide(self, summaries: list[bytes], decision: Any) -> float:
        manifest = read_manifest(Path(self.reference) / "measure.manifest.json")
        if manifest is None:
            raise UserError(
                f"reference {self.reference}: no finished measure there; run `gemsmith curate --phase measure` "
                "on the trusted pairs with this recipe first"
            )
        values = []
        for part in manifest["parts"]:
            path = Path(self.reference) / manifest["signal_set"] / part
            schema = pq.read_schema(path)
            found = schema.field(self.column).metadata or {} if self.column in schema.names else {}
            if {found.get(b"identity", b"")} != set(summaries):
                raise UserError(
                    f"reference {self.reference}: its {self.column} was not measured by the same model and settings; "
                    "measure it again with this recipe"
                )
            values.append(numbers(pq.read_table(path, columns=[self.column]), self.column))
        scores = np.concatenate(values) if values else np.zeros(0)
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            raise UserError(f"reference {self.reference}: holds no {self.column}; measure some trusted pairs")
        return float(np.quantile(scores, self.quantile, method="lower"))

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        values = numbers(table, self.column)
        return values >= in_precision(decision, values)

    def describe(self, decision: Any) -> dict[str, Any]:
        return {"thresholds": {self.column: [decision]}}
