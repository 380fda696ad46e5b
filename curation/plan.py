"""The plan of a build: where in the output every copy of every kept sample goes, before anything is copied.

A copy's place is the rank of its hash among all of them, its shard and byte
offset follow from the sizes. Both are found by shuffles (`curation.shuffle`), so
no process holds the pool: one brings equal uids together, numbers their copies
and writes the list of uids; the next brings hashes of one range together, and
the ranges in their order are one long tape that is cut into shards.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import hash64_many
from curation.selection.engine import Part, Partition, read_columns
from curation.selection.subset import PAIR, numbers, paired
from curation.selection.subset import places as ranges_of
from curation.shuffle import MapParts, RowFiles, buckets_for, gather, hash_buckets, scatter, write_npy
from curation.tar import BLOCK, END

SAMPLED, OF_EACH = 4_096, 64  # rows of the pool from whose uids the ranges are guessed: so many, and of each range
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
    ranks: np.ndarray  # int64 [buckets]: the place that each begins with
    tape_starts: np.ndarray  # int64 [buckets]
    shard_starts: np.ndarray  # int64 [output shards]

    def entries(self, part: Part | Partition) -> pa.Table:
        """Every copy that a part (or several) gives: row (of the part), copy, output, offset; by row and copy."""
        found = []
        for table in self.places.between(part.first, part.first + part.rows):
            place = table["place"].to_numpy()
            bucket = np.searchsorted(self.ranks, place, "right") - 1
            tape = table["tape"].to_numpy() + self.tape_starts[bucket]
            output = place // self.shard_samples
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
    buckets = buckets_for(sum(partition.rows for partition in pool), ROW_BYTES)
    splitters = _splitters(pool, ledger, buckets, map_parts)
    giving = [one for sent in map_parts(partial(_send_uids, ledger, folder / "uids", splitters), pool) for one in sent]
    total = sum(kept for _, kept in giving)
    numbered = gather(folder / "uids", len(pool), buckets, ROW_BYTES, partial(_number, folder), map_parts)
    ids = folder / "sample_ids.npy"
    write_npy(ids, PAIR, (), [Path(piece) for piece in numbered.summaries])

    buckets = buckets_for(total, ROW_BYTES)
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
    return Plan(
        inputs=_inputs([part for partition in pool for part in partition.parts], giving),
        sizes=[int(size) + len(END) for size in ends - shard_starts],
        samples=[min(shard_samples, total - start) for start in range(0, total, shard_samples)],
        ids=ids,
        shard_samples=shard_samples,
        members=members,
        places=replace(places, summaries=[]),
        ranks=ranks,
        tape_starts=tape_starts,
        shard_starts=shard_starts,
    )


def _inputs(parts: Sequence[Part], giving: Sequence[tuple[str, int]]) -> list[Input]:
    """`giving`: the shard of each part, and how many copies it gives."""
    groups: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(part.path.name.rpartition("-")[0], []).append(i)
    return [
        Input(
            index=index,
            shard=giving[members[0]][0],
            fingerprint=name,
            parts=tuple(parts[i] for i in members),
            kept=sum(giving[i][1] for i in members),
        )
        for index, (name, members) in enumerate(groups.items())
        if any(giving[i][1] for i in members)
    ]


def _listed(partition: Partition, ledger: Path, columns: Sequence[str]) -> list[pa.Table]:
    """These columns of the ledger, a table of each part."""
    return [read_columns(ledger / part.path.name, columns) for part in partition.parts]


def _kept(listed: Sequence[pa.Table], partition: Partition) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """(what is listed of the kept rows, their places in the pool int64, their copies int32)"""
    table = pa.concat_tables(listed)
    copies = table["copies"].to_numpy()
    here = np.flatnonzero(copies)
    return table.take(pa.array(here)), here + partition.first, copies[here]


def _splitters(pool: Sequence[Partition], ledger: Path, buckets: int, map_parts: MapParts) -> np.ndarray:
    """What divides the uids into so many ranges of about equally many: PAIR [buckets - 1]."""
    if buckets == 1:
        return np.zeros(0, PAIR)
    share = max(SAMPLED, OF_EACH * buckets) / sum(partition.rows for partition in pool)
    sample = np.concatenate(list(map_parts(partial(_sample, ledger, share), pool)))
    sample = sample[np.lexsort((sample["f1"], sample["f0"]))]  # many times as fast as to sort pairs
    return sample[len(sample) * np.arange(1, buckets) // buckets] if len(sample) else np.zeros(buckets - 1, PAIR)


def _sample(ledger: Path, share: float, partition: Partition) -> np.ndarray:
    """The kept uids below this share of all hashes: PAIR [n]."""
    table, _, _ = _kept(_listed(partition, ledger, ["uid", "copies"]), partition)
    uids = table["uid"].to_pylist()
    here = np.flatnonzero(hash64_many("uid sample", uids) < min(share, 1.0) * 2.0**64)
    return paired(*numbers([uids[i] for i in here]))


def _send_uids(ledger: Path, folder: Path, splitters: np.ndarray, partition: Partition) -> list[tuple[str, int]]:
    """Send every kept uid by its range; the shard of each part, and how many copies it gives."""
    listed = _listed(partition, ledger, ["uid", "shard", "copies"])
    table, rows, copies = _kept(listed, partition)
    high, low = numbers(table["uid"].to_pylist())
    bucket = ranges_of((splitters["f0"], splitters["f1"]), (high, low), after=True)
    sent = pa.table({"high": high, "low": low, "row": rows, "copies": copies, "bucket": bucket})
    scatter(folder, partition.number, [sent], len(splitters) + 1)
    return [(part["shard"][0].as_py(), pc.sum(part["copies"]).as_py()) for part in listed]


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
    table, rows, copies = _kept(_listed(partition, ledger, ["uid", "copies"]), partition)
    measured = partition.read(["extensions", "sizes", *members.values()]).take(pa.array(rows - partition.first))
    first = np.zeros(len(rows), np.int64)
    for found in numbered.between(partition.first, partition.first + partition.rows):
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
        "taken": taken(measured, members)[of],
        "bucket": bucket,
    }
    scatter(folder, partition.number, [pa.table(sent)], buckets)
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
