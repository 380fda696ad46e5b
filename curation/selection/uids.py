"""Keep the uids of a list: a DataComp subset (u8,u8 as .npy or without a header), a text file with one uid a line, or
a parquet column.

A list may name a uid more than once, as DataComp's subsets may: then its sample
is in the shards as often, its copies spread by their own hashes. Uids are
compared as numbers (`curation.selection.subset`), so that case means nothing and
a build's own `sample_ids.npy` names what was built. A sorted subset, as DataComp
writes them, is read where it lies; of any other list one worker makes such a file
(`curation.selection.listed`), so no process holds a list.
"""

import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.hashing import file_hash
from curation.selection.interface import Apart, Program, Shuffle
from curation.selection.listed import PARTS, sorted_parts
from curation.selection.subset import PAIR, Subset, is_subset, numbers
from curation.shuffle import write_npy

BLOCK = 1 << 17  # lines of a list in memory at once
STRIDE = 1024  # of so many uids one says where a list is cut


@dataclass(frozen=True, kw_only=True)
class Uids:
    """Keep what `file` names; `block_list` on uid drops it. Parquet needs a column `uid`.

    `repeats`: "n" keeps a sample as often as the list names it, as DataComp's resharder does; "once" keeps it once.

    Memory: of a list a block at a time; of one that is no sorted .npy in one worker, once, a 64th part.
    """

    file: str
    repeats: Literal["once", "n"] = "n"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise UserError(f"uids: {self.file}: no such file; name a subset (.npy), a text or a .parquet list")

    def content(self) -> str:
        return file_hash([Path(self.file)])

    @property
    def needs(self) -> tuple[str, ...]:
        return ("uid",)

    def decide(self) -> Program:
        """{"often": the rows that are named, and how often; "listed", "found": distinct uids; "copies"}"""
        subset, listed, copies = yield Apart(partial(in_order, Path(self.file)))
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


def in_order(path: Path, folder: Path) -> tuple[Subset, int, int]:
    """(a list as a subset, which is in this folder where the list itself is none; its distinct uids, all of them)"""
    subset = Subset(path)
    distinct, total, ordered = subset.sizes() if is_subset(path) else (0, 0, False)
    if not ordered:
        folder = folder / f"uids-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        # Cut where a sample says that parts are equal: uids may be counters, of which all have the same first bits.
        sample = np.concatenate([np.zeros((0, 2), np.uint64), *(block[::STRIDE] for block in _halves(path))])
        order = np.lexsort((sample[:, 1], sample[:, 0]))
        cuts = sample[order[len(order) * np.arange(1, PARTS) // PARTS]] if len(order) else sample
        subset = Subset(folder / "uids.npy")
        write_npy(subset.path, PAIR, (), sorted_parts(folder, _halves(path), (cuts[:, 0], cuts[:, 1])))
        distinct, total, _ = subset.sizes()
    return subset, distinct, total


def _halves(path: Path) -> Iterator[np.ndarray]:
    """The uids of a list as numbers, some at a time: uint64 [n, 2]."""
    pairs = Subset(path).blocks() if is_subset(path) else (numbers(block.to_pylist()) for block in uid_blocks(path))
    return (np.stack(pair, axis=1) for pair in pairs)


def line_blocks(path: Path) -> Iterator[list[str]]:
    """The lines of a text in UTF-8, BLOCK at a time."""
    with path.open(encoding="utf-8-sig") as file:  # some editors begin with a mark of the order of bytes
        lines = (line for text in file for line in text.splitlines())
        while block := list(itertools.islice(lines, BLOCK)):
            yield block


def uid_blocks(path: Path) -> Iterator[pa.Array]:
    """The uids of a list, repeats and all, some at a time.

    Raises:
        UserError: the file is none of the three forms.
    """
    try:
        if is_subset(path):
            for high, low in Subset(path).blocks():
                yield pa.array([f"{a:016x}{b:016x}" for a, b in zip(high.tolist(), low.tolist())], pa.string())
        elif path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                if "uid" not in file.schema_arrow.names:
                    raise ValueError("no column uid")
                for batch in file.iter_batches(columns=["uid"]):
                    yield batch.column(0).drop_null()
        else:
            for lines in line_blocks(path):
                yield pa.array([line.strip() for line in lines if line.strip()], pa.string())
    except (OSError, ValueError, pa.ArrowInvalid) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"uids: {path}: cannot be read as a list of uids ({reason})") from None
