"""The plan of a build: where in the output every copy of every kept sample goes, before anything is copied.

A copy's place is the rank of its hash among all of them, its shard and byte
offset follow from the sizes. Both are found by shuffles (`curation.shuffle`), so
no process holds the pool: one brings equal uids together, numbers their copies
and writes the list of uids; the next brings hashes of one range together, and
the ranges in their order are one long tape that is cut into shards.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.ledger import read_column
from curation.selection.engine import Part, Partition
from curation.selection.subset import PAIR, numbers, paired
from curation.shuffle import MapParts, RowFiles, buckets_for, gather, hash_buckets, scatter
from curation.tar import BLOCK, END

SAMPLED = 4_096  # uids from which the ranges of uids are guessed
ROW_BYTES = 36


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input shard that gives something: `kept` copies from its parts, which are in the pool's order."""

    index: int
    shard: str
    fingerprint: str
    parts: tuple[Part, ...]
    kept: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`sizes` and `samples` are of the output shards: bytes and copies; `ids` is the sorted list of all uids, a file
    as DataComp stores a subset (dtype u8,u8, repeats kept)."""

    inputs: list[Input]
    sizes: list[int]
    samples: list[int]
    ids: Path
    shard_samples: int
    members: Mapping[str, str]
    places: RowFiles  # row, copy int32, place int64, tape int64: bytes from the start of the bucket
    tape_starts: np.ndarray  # int64 [buckets]
    shard_starts: np.ndarray  # int64 [output shards]

    def entries(self, part: Part) -> pa.Table:
        """Every copy that a part gives: row (of the part), copy, output, offset; by row and copy."""
        found = []
        for bucket, table in self.places.between(part.first, part.first + part.rows):
            tape = table["tape"].to_numpy() + self.tape_starts[bucket]
            output = table["place"].to_numpy() // self.shard_samples
            columns = {
                "row": table["row"].to_numpy() - part.first,
                "copy": table["copy"],
                "output": output,
                "offset": tape - self.shard_starts[output],
            }
            found.append(pa.table(columns))
        return pa.concat_tables(found).sort_by([("row", "ascending"), ("copy", "ascending")]) if found else _NO_ENTRIES


_NO_ENTRIES = pa.schema(
    [("row", pa.int64()), ("copy", pa.int32()), ("output", pa.int64()), ("offset", pa.int64())]
).empty_table()


def plan(
    pool: Sequence[Partition],
    ledger: Path,
    folder: Path,
    *,
    seed: int,
    shard_samples: int,
    members: Mapping[str, str],
    map_parts: MapParts = map,
) -> Plan:
    """Plan the build of what the ledger keeps.

    Args:
        pool: partitions in the pool's order, the parts of one input shard after one another.
        folder: for the plan's files; stays as long as the plan is used.
        members: extension -> column of strings that becomes a member of each sample where it is not null.

    Raises:
        UserError: a sample has a member of such an extension already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [n for counts in map_parts(partial(_count, ledger), pool) for n in counts]
    buckets = buckets_for(sum(kept), ROW_BYTES)
    splitters = _splitters(pool, ledger, buckets, map_parts)
    for _ in map_parts(partial(_send_uids, ledger, folder / "uids", splitters), pool):
        pass
    numbered = gather(folder / "uids", len(pool), buckets, ROW_BYTES, partial(_number, folder), map_parts)
    ids = _join(folder / "sample_ids.npy", [Path(piece) for piece in numbered.summaries], sum(kept))

    sent = np.zeros(buckets, np.int64)
    send = partial(_send_hashes, ledger, folder / "places", numbered, seed, buckets, members)
    for counts in map_parts(send, pool):
        sent += counts
    ranks = np.cumsum(sent) - sent
    order = partial(_place, ranks, buckets, shard_samples)
    places = gather(folder / "places", len(pool), buckets, ROW_BYTES, order, map_parts)
    lengths = np.array([length for length, _ in places.summaries], np.int64)
    tape_starts = np.cumsum(lengths) - lengths
    begins = [start + at for start, (_, at) in zip(tape_starts, places.summaries, strict=True)]
    shard_starts = np.concatenate([np.zeros(0, np.int64), *begins])
    ends = np.append(shard_starts[1:], lengths.sum()) if len(shard_starts) else shard_starts
    total = sum(kept)
    return Plan(
        inputs=_inputs([part for partition in pool for part in partition.parts], kept),
        sizes=[int(size) + len(END) for size in ends - shard_starts],
        samples=[min(shard_samples, total - start) for start in range(0, total, shard_samples)],
        ids=ids,
        shard_samples=shard_samples,
        members=members,
        places=places,
        tape_starts=tape_starts,
        shard_starts=shard_starts,
    )


def _inputs(parts: Sequence[Part], kept: Sequence[int]) -> list[Input]:
    groups: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(part.path.name.rpartition("-")[0], []).append(i)
    return [
        Input(
            index=index,
            shard=Partition(number=0, parts=(parts[members[0]],)).read(["shard"])["shard"][0].as_py(),
            fingerprint=name,
            parts=tuple(parts[i] for i in members),
            kept=sum(kept[i] for i in members),
        )
        for index, (name, members) in enumerate(groups.items())
        if any(kept[i] for i in members)
    ]


def _copies(partition: Partition, ledger: Path) -> np.ndarray:
    return np.concatenate([read_column(ledger, part, "copies") for part in partition.parts])


def _kept(partition: Partition, ledger: Path, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """(the columns of the kept rows, their places in the pool int64, their copies int32)"""
    copies = _copies(partition, ledger)
    here = np.flatnonzero(copies)
    return partition.read(columns).take(pa.array(here)), here + partition.first, copies[here]


def _count(ledger: Path, partition: Partition) -> list[int]:
    """Copies of each part."""
    return [int(read_column(ledger, part, "copies").sum()) for part in partition.parts]


def _splitters(pool: Sequence[Partition], ledger: Path, buckets: int, map_parts: MapParts) -> np.ndarray:
    """What divides the uids into so many ranges of about equally many: PAIR [buckets - 1]."""
    sample, weights = np.zeros(0, PAIR), np.zeros(0, np.uint64)
    for hashes, uids in map_parts(partial(_sample, ledger), pool) if buckets > 1 else ():
        weights, sample = np.concatenate([weights, hashes]), np.concatenate([sample, uids])
        lowest = np.argsort(weights, kind="stable")[:SAMPLED]
        weights, sample = weights[lowest], sample[lowest]
    return np.sort(sample)[len(sample) * np.arange(1, buckets) // buckets]


def _sample(ledger: Path, partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """Of at most SAMPLED uids with the lowest hashes: the hashes, the uids as PAIR."""
    table, _, _ = _kept(partition, ledger, ["uid"])
    uids = table["uid"].to_pylist()
    hashes = hash64_many("uid sample", uids)
    lowest = np.argsort(hashes, kind="stable")[:SAMPLED]
    high, low = numbers([uids[i] for i in lowest])
    return hashes[lowest], paired(high, low)


def _send_uids(ledger: Path, folder: Path, splitters: np.ndarray, partition: Partition) -> None:
    table, rows, copies = _kept(partition, ledger, ["uid"])
    high, low = numbers(table["uid"].to_pylist())
    bucket = np.searchsorted(splitters["f0"], high, "left")
    for splitter in splitters:  # those with the same high half as a splitter, as all short numbers have
        bucket += (high == splitter["f0"]) & (low >= splitter["f1"])
    sent = pa.table({"high": high, "low": low, "row": rows, "copies": copies, "bucket": bucket})
    scatter(folder, partition.number, sent, len(splitters) + 1)


def _number(folder: Path, pieces: Iterator[pa.Table]) -> tuple[pa.Table, str]:
    """(of rows whose uid an earlier row has: the number of its first copy; a file of the bucket's uids, sorted)"""
    table = pa.concat_tables(pieces)
    high, low, rows, copies = (table[name].to_numpy() for name in ("high", "low", "row", "copies"))
    order = np.lexsort((rows, low, high))
    high, low, rows, copies = high[order], low[order], rows[order], copies[order].astype(np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    before = np.cumsum(copies) - copies
    first = before - before[new][np.cumsum(new) - 1] if len(rows) else before
    file = folder / f"ids-{uuid.uuid4().hex}"
    file.write_bytes(np.repeat(paired(high, low), copies).tobytes())
    repeated = ~new
    return pa.table({"row": rows[repeated], "first": first[repeated]}), str(file)


def _join(path: Path, pieces: Sequence[Path], length: int) -> Path:
    """One .npy of the pieces, in their order."""
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(PAIR), "fortran_order": False, "shape": (length,)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(piece.read_bytes())
            piece.unlink()
    return path


def _send_hashes(
    ledger: Path,
    folder: Path,
    numbered: RowFiles,
    seed: int,
    buckets: int,
    members: Mapping[str, str],
    partition: Partition,
) -> np.ndarray:
    """Send every copy by its hash; how many went to each bucket: int64 [buckets]."""
    table, rows, copies = _kept(partition, ledger, ["uid", "extensions", "sizes", *members.values()])
    first = np.zeros(len(rows), np.int64)
    for _, found in numbered.between(partition.first, partition.first + partition.rows):
        first[np.searchsorted(rows, found["row"].to_numpy())] = found["first"].to_numpy()
    of = np.repeat(np.arange(len(rows)), copies)  # the row of each copy
    number = first[of] + np.arange(len(of)) - (np.cumsum(copies) - copies)[of]
    uids = table["uid"].to_pylist()
    hashes = hash64_many(f"{seed}/shuffle", uids)[of]
    again = np.flatnonzero(number)  # further copies lie anywhere, so that no batch holds one sample twice
    named = [f"{uids[of[i]]}\x00{number[i]}" for i in again]
    hashes[again] = hash64_many(f"{seed}/shuffle", named)
    bucket = hash_buckets(hashes, buckets)
    sent = {
        "hash": hashes,
        "row": rows[of],
        "copy": number.astype(np.int32),
        "taken": taken(table, members)[of],
        "bucket": bucket,
    }
    scatter(folder, partition.number, pa.table(sent), buckets)
    return np.bincount(bucket, minlength=buckets)


def taken(table: pa.Table, members: Mapping[str, str]) -> np.ndarray:
    """How many bytes of a tar each sample takes, with its new members: int64 [rows]."""
    present = pc.is_in(pc.list_flatten(table["extensions"]), value_set=pa.array(list(members), pa.string()))
    if pc.any(present).as_py():
        raise UserError(
            f"members: samples of the pool have one of {', '.join(members)} already; name another extension"
        )
    lists = table["sizes"].combine_chunks()
    blocks = BLOCK + -(-pc.list_flatten(lists).to_numpy() // BLOCK) * BLOCK
    ends = np.concatenate([[0], np.cumsum(blocks)])
    own = np.diff(ends[np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())])])
    for column in members.values():
        length = pc.binary_length(table[column])
        own += np.where(length.is_valid(), BLOCK + -(-pc.fill_null(length, 0).to_numpy() // BLOCK) * BLOCK, 0)
    return own


def _place(
    ranks: np.ndarray, buckets: int, shard_samples: int, pieces: Iterator[pa.Table]
) -> tuple[pa.Table, tuple[int, np.ndarray]]:
    """(where each copy of the bucket goes; its bytes, and at which of them output shards begin)"""
    table = pa.concat_tables(pieces)
    hashes, rows, copy, size = (table[name].to_numpy() for name in ("hash", "row", "copy", "taken"))
    order = np.lexsort((copy, rows, hashes))
    start = ranks[hash_buckets(hashes[:1], buckets)[0]] if len(order) else 0
    place = start + np.arange(len(order))
    tape = np.cumsum(size[order]) - size[order]
    found = pa.table({"row": rows[order], "copy": copy[order], "place": place, "tape": tape})
    return found, (int(size.sum()), tape[place % shard_samples == 0])
