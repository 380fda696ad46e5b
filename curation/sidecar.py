"""What parquet files beside the tars know of a sample: img2dataset's `{shard}.parquet`, and DataComp's metadata.

The first belongs to one tar and is found by the sample's key, else its uid. The
second is given with the tars, or lies beside them under names of its own; its
rows belong to samples anywhere, by uid. Their columns (scores that somebody has
computed, original sizes, licences) become part of the sample's record, so that
they are read and not measured again; the shards that come out do not carry them.

Metadata is found through an index that is made once, in the signal store and
before anything is measured: the uids' hashes, sorted (8 bytes a row, mapped into
memory by every worker), and where each row lies (8 more). It is sorted by a
shuffle (`curation.shuffle`), since there are as many rows as the pool has. The
rows of a tar mostly lie in one file, since img2dataset goes through them in
order, so the last files read are kept. In tars that were shuffled they lie
anywhere: those of many samples are looked up together, each file once.
"""

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import files
from curation.errors import UserError, one_line
from curation.hashing import config_hash, hash64_many
from curation.pool import Shard
from curation.shuffle import MapParts, buckets_for, gather, hash_buckets, scatter, write_npy
from curation.sources.parquet import plain_rows, plain_values

UIDS = ("uid", "UID")
ROW_BYTES = 16  # of a row while it is sorted
BATCH = 1 << 16  # uids that are read at once


class Sidecar:
    """The tables of one tar. `damage` names one of them that could not be read, "reason: detail"."""

    def __init__(self, shard: Shard, root: Path) -> None:
        self.damage: str | None = None
        self._by_key: dict[str, dict[str, Any]] = {}
        self._by_uid: dict[str, dict[str, Any]] = {}
        self._metadata = None
        self._looked_up: dict[str, Mapping[str, Any]] = {}  # of metadata, by uid
        if shard.sidecar is not None:
            try:
                rows = list(plain_rows(_table(shard.sidecar)))
            except (OSError, pa.ArrowException) as reason:
                self.damage = f"sidecar_damaged: {one_line(reason, 200)}"
            else:
                self._by_key = {row["key"]: row for row in rows if isinstance(row.get("key"), str)}
                self._by_uid = {uid: row for row in rows if (uid := _spelled(row.get("uid"))) is not None}
        if shard.metadata:
            self._metadata = Metadata(index_folder(root, shard.metadata, shard.tables), shard.metadata)

    def expect(self, samples: Iterable[tuple[str, object]]) -> None:
        """Look up what metadata says of these samples (key, and what the json has as uid), before they are asked for
        one by one."""
        if self._metadata:
            uids = {uid for key, said in samples if (uid := self._uid(key, said)) is not None}
            self._looked_up = {uid: {} for uid in uids}
            self._looked_up.update(self._metadata.rows(sorted(uids)))

    def row(self, key: str, uid: object) -> Mapping[str, Any]:
        """The row of a sample, {} where there is none; its own table's columns before those of metadata."""
        own = self._by_key.get(key.rpartition("/")[2], {})
        named = self._uid(key, uid)
        if named is None:
            return own
        own = own or self._by_uid.get(named, {})
        if self._metadata and named not in self._looked_up:
            self.expect([(key, uid)])
        return {**self._looked_up.get(named, {}), **own}

    def _uid(self, key: str, said: object) -> str | None:
        """The uid by which a sample's row is looked for: the json's, else that of the table."""
        uid = _spelled(said)
        return _spelled(self._by_key.get(key.rpartition("/")[2], {}).get("uid")) if uid is None else uid


class Metadata:
    """Rows by uid over several parquet files, by the index that `make_index` made in the folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._content = folder.name
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")
        self._names = names

    def rows(self, uids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By uid the first row that has it, of those of these uids that have one. Each file is read once, or once more
        where hashes are equal and uids are not."""
        hashes = hash64_many("uid", uids)
        ends = dict(zip(uids, np.searchsorted(self._hashes, hashes, "right").tolist(), strict=True))
        waiting = dict(zip(uids, np.searchsorted(self._hashes, hashes).tolist(), strict=True))
        found: dict[str, dict[str, Any]] = {}
        while waiting := {uid: at for uid, at in waiting.items() if uid not in found and at < ends[uid]}:
            by_file: dict[int, list[tuple[int, str]]] = {}
            for uid, at in waiting.items():
                file, row = self._places[at].tolist()
                by_file.setdefault(file, []).append((row, uid))
            for file, wanted in sorted(by_file.items()):
                table = _kept_table(self._names[file], self._content).take([row for row, _ in wanted])
                for (_, uid), record in zip(wanted, plain_rows(table), strict=True):
                    if _spelled(record.get("uid")) == uid:
                        found[uid] = record
            waiting = {uid: at + 1 for uid, at in waiting.items()}
        return found


def _spelled(uid: object) -> str | None:
    """A uid as it is looked for: text that UTF-8 can hold, and a whole number by its digits, since json and table need
    not have one type."""
    if isinstance(uid, int) and not isinstance(uid, bool):
        return str(uid)
    return uid if isinstance(uid, str) and not any("\ud800" <= c <= "\udfff" for c in uid) else None


def index_folder(root: Path, names: Sequence[str], content: str) -> Path:
    """Where in the signal store the index of these files is. `content` changes when theirs does."""
    return root / "metadata" / config_hash([list(names), content])


def make_index(folder: Path, names: Sequence[str], map_parts: MapParts = map) -> None:
    """Make the index of these files at `index_folder`, where it is not there; no process holds more than a bucket.

    Raises:
        UserError: one of them cannot be read: to go on without its scores would drop samples for no reason of theirs.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        _write_index(temporary, names, map_parts)
        with suppress(OSError):  # another job has made the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_index(folder: Path, names: Sequence[str], map_parts: MapParts) -> None:
    buckets = buckets_for(sum(map_parts(_rows, names)), ROW_BYTES)
    sent = folder / "uids"
    for _ in map_parts(partial(_send, sent, buckets), list(enumerate(names))):
        pass
    pieces = gather(sent, len(names), buckets, ROW_BYTES, partial(_sort, folder), map_parts).summaries
    for name, kind, shape in (("hashes", np.uint64, ()), ("places", np.int32, (2,))):
        write_npy(folder / f"{name}.npy", np.dtype(kind), shape, [Path(f"{piece}.{name}") for piece in pieces])
    shutil.rmtree(sent)


def _rows(name: str) -> int:
    with _readable(name), files.opened(name) as f:
        return pq.read_metadata(f).num_rows


def _send(folder: Path, buckets: int, item: tuple[int, str]) -> None:
    number, name = item
    scatter(folder, number, _hashed(number, name, buckets), buckets)


def _hashed(number: int, name: str, buckets: int) -> Iterator[pa.Table]:
    """Of the rows with a uid: hash, file, row, bucket; at least one table."""
    first = 0
    for uids in _uids(name):
        rows = np.flatnonzero(uids.is_valid().to_numpy(zero_copy_only=False))
        hashes = hash64_many("uid", plain_values(uids.drop_null()))
        places = {"file": np.full(len(rows), number, np.int32), "at": (first + rows).astype(np.int32)}
        yield pa.table({"hash": hashes, **places, "bucket": hash_buckets(hashes, buckets)})
        first += len(uids)


def _uids(name: str) -> Iterator[pa.Array]:
    """BATCH of them at a time, and an empty one at the end."""
    with _readable(name), files.fetched(name) as f:
        parquet = pq.ParquetFile(f)
        column = next((c for c in UIDS if c in parquet.schema_arrow.names), None)
        if column is not None:
            for batch in parquet.iter_batches(BATCH, columns=[column]):
                yield batch.column(0).cast(pa.string())
    yield pa.array([], pa.string())


def _sort(folder: Path, pieces: Iterator[pa.Table]) -> tuple[pa.Table, str]:
    """(nothing by row; how the files are called that have the bucket's hashes, sorted, and places)"""
    table = pa.concat_tables(pieces)
    table = table.take(pc.sort_indices(table["hash"]))  # stable: of equal uids, the first
    stem = folder / f"bucket-{uuid.uuid4().hex}"
    places = np.stack([table["file"].to_numpy(), table["at"].to_numpy()], axis=1)
    Path(f"{stem}.hashes").write_bytes(table["hash"].to_numpy().tobytes())
    Path(f"{stem}.places").write_bytes(places.tobytes())
    return pa.table({"row": pa.array([], pa.int64())}), str(stem)


@lru_cache(maxsize=2)
def _kept_table(name: str, content: str) -> pa.Table:
    """`content` changes with the file."""
    return _checked(name)


def _checked(name: str) -> pa.Table:
    with _readable(name):
        return _table(name)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as reason:
        line = one_line(reason, 200)
        raise UserError(f"--pool {name}: metadata that cannot be read ({line}); mend it or leave it out") from None


def _table(name: str) -> pa.Table:
    with files.fetched(name) as f:
        return pq.ParquetFile(f).read()
