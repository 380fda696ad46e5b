"""Keep the uids of a list: a DataComp subset (.npy of u8,u8), a text file with one uid a line, or a parquet column."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import file_hash
from curation.selection.interface import Pass


@dataclass(frozen=True, kw_only=True)
class Uids:
    """Keep what `file` names; `block_list` on uid drops it. Parquet needs a column `uid`."""

    file: str
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise UserError(f"uids: {self.file}: no such file; name a .npy, .txt or .parquet list")

    def content(self) -> str:
        return file_hash([Path(self.file)])

    @property
    def needs(self) -> tuple[str, ...]:
        return ("uid",)

    def passes(self) -> Sequence[Pass]:
        return (Pass(_nothing, self._decide),)

    def _decide(self, summaries: list[None], decision: Any) -> pa.Array:
        return read_uids(Path(self.file))

    def apply(self, table: pa.Table, decision: pa.Array) -> np.ndarray:
        return pc.is_in(table["uid"], value_set=decision).to_numpy()

    def describe(self, decision: pa.Array) -> dict[str, Any]:
        return {"listed": len(decision)}


def _nothing(table: pa.Table, decision: Any) -> None:
    """The list alone decides."""


def read_uids(path: Path) -> pa.Array:
    """The distinct uids of a list.

    Raises:
        UserError: the file is none of the three forms.
    """
    try:
        if path.suffix == ".npy":
            pairs = np.load(path)
            if pairs.dtype != np.dtype("u8,u8"):
                raise UserError(f"uids: {path}: dtype is {pairs.dtype}; a DataComp subset has u8,u8")
            return pa.array([f"{a:016x}{b:016x}" for a, b in np.unique(pairs).tolist()], pa.string())
        if path.suffix == ".parquet":
            return pq.read_table(path, columns=["uid"])["uid"].combine_chunks().unique()
        return pa.array(sorted({line.strip() for line in path.read_text().splitlines() if line.strip()}), pa.string())
    except (OSError, ValueError, pa.ArrowInvalid) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"uids: {path}: cannot be read as a list of uids ({reason})") from None
