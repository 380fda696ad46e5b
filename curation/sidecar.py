"""What parquet files beside the tars know of a sample: img2dataset's `{shard}.parquet`, and DataComp's metadata.

The first belongs to one tar and is found by the sample's key, else its uid. The
second is given with the tars, or lies beside them under names of its own; its
rows belong to samples anywhere, by uid. Their columns (scores that somebody has
computed, original sizes, licences) become part of the sample's record, so that
they are read and not measured again; the shards that come out do not carry them.

Metadata is found through an index that is made once, in the signal store: the
uids' hashes, sorted (8 bytes a row, mapped into memory by every worker), and
where each row lies (8 more). The rows of a tar mostly lie in one file, since
img2dataset goes through them in order, so the last files read are kept.
"""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import files
from curation.errors import UserError
from curation.hashing import config_hash, hash64, hash64_many
from curation.pool import Shard
from curation.sources.parquet import plain_rows

UIDS = ("uid", "UID")


class Sidecar:
    """The tables of one tar. `damage` names one of them that could not be read, "reason: detail"."""

    def __init__(self, shard: Shard, root: Path) -> None:
        self.damage: str | None = None
        self._by_key: dict[str, dict[str, Any]] = {}
        self._by_uid: dict[str, dict[str, Any]] = {}
        self._metadata = None
        if shard.sidecar is not None:
            try:
                rows = list(plain_rows(_table(shard.sidecar)))
            except (OSError, pa.ArrowException) as reason:
                self.damage = f"sidecar_damaged: {' '.join(str(reason).split())[:200]}"
            else:
                self._by_key = {row["key"]: row for row in rows if isinstance(row.get("key"), str)}
                self._by_uid = {row["uid"]: row for row in rows if isinstance(row.get("uid"), str)}
        if shard.metadata:
            self._metadata = open_metadata(root, shard.metadata, shard.fingerprint.partition(".")[2])

    def row(self, key: str, uid: object) -> Mapping[str, Any]:
        """The row of a sample, {} where there is none; its own table's columns before those of metadata."""
        own = self._by_key.get(key.rpartition("/")[2], {})
        named = uid if isinstance(uid, str) else own.get("uid")
        if not isinstance(named, str):
            return own
        own = own or self._by_uid.get(named, {})
        return {**self._metadata.row(named), **own} if self._metadata else own


class Metadata:
    """Rows by uid over several parquet files."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._content = folder.name
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")
        self._names = names

    def row(self, uid: str) -> dict[str, Any]:
        wanted = np.uint64(hash64("uid", uid))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            file, row = self._places[at].tolist()
            found = next(plain_rows(_kept_table(self._names[file], self._content).slice(row, 1)))
            if found.get("uid") == uid:
                return found
            at += 1
        return {}


def open_metadata(root: Path, names: Sequence[str], content: str) -> Metadata:
    """The rows of these files by uid, through the index in the signal store, which is made where it is not there.

    Args:
        content: what changes when the files do.

    Raises:
        UserError: one of them cannot be read: to go on without its scores would drop samples for no reason of theirs.
    """
    folder = root / "metadata" / config_hash([list(names), content])
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        _write_index(temporary, names)
        try:
            temporary.rename(folder)
        except OSError:  # another worker has made the same
            shutil.rmtree(temporary)
    return Metadata(folder, names)


def _write_index(folder: Path, names: Sequence[str]) -> None:
    hashes, places = [], []
    for file, name in enumerate(names):
        uids = _checked(name, UIDS)
        if not uids.num_columns:
            continue
        column = uids.column(0).cast(pa.string())
        rows = np.flatnonzero(column.is_valid().to_numpy())
        hashes.append(hash64_many("uid", column.drop_null().to_pylist()))
        places.append(np.stack([np.full(len(rows), file), rows], axis=1).astype(np.int32))
    found = np.concatenate([*hashes, np.zeros(0, np.uint64)])
    order = np.argsort(found, kind="stable")  # of equal uids, the first
    np.save(folder / "hashes.npy", found[order])
    np.save(folder / "places.npy", np.concatenate([*places, np.zeros((0, 2), np.int32)])[order])


@lru_cache(maxsize=2)
def _kept_table(name: str, content: str) -> pa.Table:
    """`content` changes with the file."""
    return _checked(name)


def _checked(name: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return _table(name, columns)
    except (OSError, pa.ArrowException) as reason:
        line = " ".join(str(reason).split())[:200]
        raise UserError(f"--pool {name}: metadata that cannot be read ({line}); mend it or leave it out") from None


def _table(name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or those of the columns that it has."""
    with files.fetched(name) as f:
        parquet = pq.ParquetFile(f)
        there = parquet.schema_arrow.names
        return parquet.read(columns=None if columns is None else [c for c in columns if c in there])
