"""Keep the uids of a list: a DataComp subset (.npy of u8,u8), a text file with one uid a line, or a parquet column.

A list may name a uid more than once, as DataComp's subsets may: then its sample
is in the shards as often, its copies spread by their own hashes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import file_hash


@dataclass(frozen=True, kw_only=True)
class Uids:
    """Keep what `file` names; `block_list` on uid drops it. Parquet needs a column `uid`.

    `repeats`: "n" keeps a sample as often as the list names it, as DataComp's resharder does; "once" keeps it once.
    """

    file: str
    repeats: Literal["once", "n"] = "n"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise UserError(f"uids: {self.file}: no such file; name a .npy, .txt or .parquet list")

    def content(self) -> str:
        return file_hash([Path(self.file)])

    @property
    def needs(self) -> tuple[str, ...]:
        return ("uid",)

    def decide(self) -> pa.Table:
        """(uid, distinct; how often it is kept)"""
        counts = read_uids(Path(self.file)).value_counts()
        often = counts.field("counts").to_numpy() if self.repeats == "n" else np.ones(len(counts), int)
        return pa.table({"uid": counts.field("values"), "copies": often})

    def apply(self, table: pa.Table, decision: pa.Table) -> np.ndarray:
        place = pc.index_in(table["uid"], value_set=decision["uid"].combine_chunks())
        often = decision["copies"].to_numpy()[pc.fill_null(place, 0).to_numpy()] if decision.num_rows else 0
        return np.where(place.is_valid().to_numpy(), often, 0).astype(np.int32)

    def describe(self, decision: pa.Table) -> dict[str, Any]:
        return {"listed": decision.num_rows, "copies": int(decision["copies"].to_numpy().sum())}


def read_uids(path: Path) -> pa.Array:
    """The uids of a list, repeats and all.

    Raises:
        UserError: the file is none of the three forms.
    """
    try:
        if path.suffix == ".npy":
            pairs = np.load(path)
            if pairs.dtype != np.dtype("u8,u8"):
                raise UserError(f"uids: {path}: dtype is {pairs.dtype}; a DataComp subset has u8,u8")
            return pa.array([f"{a:016x}{b:016x}" for a, b in pairs.tolist()], pa.string())
        if path.suffix == ".parquet":
            return pq.read_table(path, columns=["uid"])["uid"].combine_chunks().drop_null()
        return pa.array([line.strip() for line in path.read_text().splitlines() if line.strip()], pa.string())
    except (OSError, ValueError, pa.ArrowInvalid) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"uids: {path}: cannot be read as a list of uids ({reason})") from None
