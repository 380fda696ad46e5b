"""Keep the uids of a list: a DataComp subset (.npy of u8,u8), a text file with one uid a line, or a parquet column.

A list may name a uid more than once, as DataComp's subsets may: then its sample
is in the shards as often, its copies spread by their own hashes. Uids are
compared as numbers (`curation.selection.subset`), so that case means nothing and
a build's own `sample_ids.npy` names what was built. A sorted subset, as DataComp
writes them, stays in its file; any other list is held in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import file_hash
from curation.selection.interface import Program, Shuffle
from curation.selection.subset import Subset, numbers


@dataclass(frozen=True, kw_only=True)
class Uids:
    """Keep what `file` names; `block_list` on uid drops it. Parquet needs a column `uid`.

    `repeats`: "n" keeps a sample as often as the list names it, as DataComp's resharder does; "once" keeps it once.

    Memory: of a sorted .npy a block at a time; of any other list 16 bytes a uid, in every process.
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

    def decide(self) -> Program:
        """{"often": the rows that are named, and how often; "listed", "found": distinct uids; "copies"}"""
        subset = Subset(Path(self.file))
        listed, copies, ordered = subset.sizes() if subset.path.suffix == ".npy" else (0, 0, False)
        if not ordered:
            subset = Subset.of(subset.path, numbers(read_uids(subset.path).to_pylist()))
            listed, copies, _ = subset.sizes()
        often = yield Shuffle(subset.sent, subset.counted, row_bytes=24)
        found = sum(often.summaries)  # equal uids are in one bucket
        return {"often": often, "listed": listed, "found": found, "copies": copies}

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        often, rows = np.zeros(table.num_rows, np.int32), table["row"].to_numpy()
        for found in decision["often"].between(int(rows[0]), int(rows[-1]) + 1) if len(rows) else ():
            often[np.searchsorted(rows, found["row"].to_numpy())] = found["often"].to_numpy()
        return np.minimum(often, 1) if self.repeats == "once" else often

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        """Distinct uids of the list, how many of them the pool has, and the copies that the list asks for."""
        listed = decision["listed"]
        copies = listed if self.repeats == "once" else decision["copies"]
        return {"listed": listed, "found": decision["found"], "copies": copies}


def read_uids(path: Path) -> pa.Array:
    """All of `uid_blocks`."""
    blocks = list(uid_blocks(path))
    return pa.concat_arrays(blocks) if blocks else pa.array([], pa.string())


def uid_blocks(path: Path) -> Iterator[pa.Array]:
    """The uids of a list, repeats and all; some at a time where it is no text.

    Raises:
        UserError: the file is none of the three forms.
    """
    try:
        if path.suffix == ".npy":
            for high, low in Subset(path).blocks():
                yield pa.array([f"{a:016x}{b:016x}" for a, b in zip(high.tolist(), low.tolist())], pa.string())
        elif path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                if "uid" not in file.schema_arrow.names:
                    raise ValueError("no column uid")
                for batch in file.iter_batches(columns=["uid"]):
                    yield batch.column(0).drop_null()
        else:
            lines = path.read_text("utf-8-sig").splitlines()
            yield pa.array([line.strip() for line in lines if line.strip()], pa.string())
    except (OSError, ValueError, pa.ArrowInvalid) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"uids: {path}: cannot be read as a list of uids ({reason})") from None
