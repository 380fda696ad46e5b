"""The build: kept samples into shuffled webdataset shards, by copying raw member bytes to offsets planned in advance.

A sample's place is the rank of hash(seed, uid) among all kept ones; its shard
and byte offset follow from the sizes, before anything is copied. So every input
shard is streamed once by whichever worker takes it, every sample is one
`pwrite` into a preallocated output file, and the bytes are the same for any
number of workers and any order. A marker for each finished input shard makes a
killed build resume with those in flight; the shards appear by one rename.

Nothing is decoded or encoded; image, text, json and any other member are copied
as they are, under the key `{uid}-{j}` (j counts equal uids), as DataComp's
resharder names them. Markers hold against a killed process, not against a power
cut: files are not synced one by one.
"""

import hashlib
import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.hashing import hash64_many
from curation.ledger import read_column
from curation.manifest import SCHEMA_VERSION
from curation.selection.engine import MapParts, Part
from curation.sources import Source, whole_shard
from curation.tar import BLOCK, END, headers, padded

OPEN_FILES = 256  # output files that one worker holds open
ZEROS = bytes(BLOCK)
HEX = re.compile(r"[0-9a-fA-F]{32}")
UID = np.dtype("u8,u8")


@dataclass(frozen=True, kw_only=True)
class Copy:
    """What one input shard gives: its parts and, for each kept row in order, (output shard, offset, copy number)."""

    index: int
    shard: str
    fingerprint: str
    parts: list[Path]
    ledger: Path
    output: np.ndarray  # int32 [kept]
    offset: np.ndarray  # int64 [kept]
    copy: np.ndarray  # int32 [kept]


@dataclass(frozen=True, kw_only=True)
class Plan:
    copies: list[Copy]
    sizes: list[int]  # bytes of each output shard
    samples: list[int]  # samples of each output shard
    ids: np.ndarray  # the kept uids as DataComp stores a subset: dtype u8,u8, sorted, repeats kept


def plan(parts: Sequence[Part], ledger: Path, *, seed: int, shard_samples: int, map_parts: MapParts = map) -> Plan:
    """Where every kept sample goes. `parts` are in the pool's order, those of one input shard together."""
    found = list(map_parts(partial(_measure_part, ledger, seed), parts))
    hashes = np.concatenate([f[0] for f in found]) if found else np.zeros(0, np.uint64)
    taken = np.concatenate([f[1] for f in found]) if found else np.zeros(0, np.int64)
    order = np.argsort(hashes, kind="stable")
    total = len(order)

    place = np.empty(total, np.int64)
    place[order] = np.arange(total)
    output = (place // shard_samples).astype(np.int32)
    ends = np.cumsum(taken[order])
    starts = ends - taken[order]
    first = starts[::shard_samples]  # where each output shard begins in one long tape
    offset = np.empty(total, np.int64)
    offset[order] = starts - np.repeat(first, shard_samples)[:total]
    # Equal uids have equal hashes and so lie side by side: the copy number is the place in that run.
    ordered = hashes[order]
    new_run = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if total else np.zeros(0, bool)
    copy = np.empty(total, np.int32)
    copy[order] = np.arange(total) - np.flatnonzero(new_run)[np.cumsum(new_run) - 1] if total else 0

    bounds = np.append(first, ends[-1] if total else 0)
    sizes = [int(n) + len(END) for n in np.diff(bounds)]
    samples = np.bincount(output, minlength=len(sizes)).tolist() if total else []
    copies: list[Copy] = []
    at = 0
    ids = np.concatenate([f[3] for f in found]) if found else np.zeros(0, UID)
    groups: OrderedDict[str, list[int]] = OrderedDict()
    for i, part in enumerate(parts):
        groups.setdefault(part.path.name.rpartition("-")[0], []).append(i)
    for index, (name, members) in enumerate(groups.items()):
        kept = sum(len(found[i][0]) for i in members)
        here = slice(at, at + kept)
        at += kept
        copies.append(
            Copy(
                index=index,
                shard=found[members[0]][2],
                fingerprint=name,
                parts=[parts[i].path for i in members],
                ledger=ledger,
                output=output[here],
                offset=offset[here],
                copy=copy[here],
            )
        )
    return Plan(copies=copies, sizes=sizes, samples=samples, ids=np.sort(ids))


def _measure_part(ledger: Path, seed: int, part: Part) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
    """For the kept rows of a part: (hash uint64 [kept], bytes in a tar int64 [kept], input shard, uids UID [kept])."""
    table = pq.read_table(part.path, columns=["uid", "sizes", "shard"])
    kept = read_column(ledger, part, "copies") > 0
    shard = table["shard"][0].as_py()
    table = table.filter(pa.array(kept))
    lists = table["sizes"].combine_chunks()
    taken = BLOCK + -(-lists.flatten().to_numpy() // BLOCK) * BLOCK
    ends = np.concatenate([[0], np.cumsum(taken)])[np.cumsum([0, *lists.value_lengths().to_pylist()])]
    uids = table["uid"].to_pylist()
    return hash64_many(f"{seed}/shuffle", uids), np.diff(ends), shard, _numbers(uids)


def _numbers(uids: Sequence[str]) -> np.ndarray:
    """Uids as numbers of 128 bits, UID [n]; one that is not 32 hex digits, which DataComp's always are, by its md5."""
    digits = (uid if HEX.fullmatch(uid) else hashlib.md5(uid.encode()).hexdigest() for uid in uids)
    return np.frombuffer(bytes.fromhex("".join(digits)), ">u8").astype("u8").view(UID)


def kept_rows(part: Part, ledger: Path) -> list[int]:
    """The rows of a part that are kept, in the order of `Copy`."""
    return np.flatnonzero(read_column(ledger, part, "copies") > 0).tolist()


class Copying:
    """Copies one input shard. A worker calls it with a `Copy`; it leaves a marker when all bytes are written."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        self._sizes = sizes

    def __call__(self) -> Callable[[Copy], dict[str, Any]]:
        return self.do

    def do(self, item: Copy) -> dict[str, Any]:
        """Copy the kept samples of one input shard: {"samples", "bytes"}.

        Raises:
            UserError: the shard is not the one that was measured.
        """
        outputs = _Outputs(self._folder, self._sizes)
        at = written = 0
        try:
            with whole_shard(item.shard, item.fingerprint) as tape:
                for path in item.parts:
                    samples = _kept_samples(tape, path, item.ledger, item.copy[at:])
                    for sample in samples:
                        outputs.write(int(item.output[at]), int(item.offset[at]), sample)
                        written += len(sample)
                        at += 1
        finally:
            outputs.close()
        assert at == len(item.output), (item.shard, at, len(item.output))
        marker(self._folder, item).touch()
        return {"samples": at, "bytes": written}


def _kept_samples(tape: Source, part: Path, ledger: Path, copies: np.ndarray) -> Iterator[memoryview]:
    """Each kept sample of a part as it lies in a tar: headers, bytes and padding of its members. Valid until the next.

    Bytes are read straight to their place between the headers, in one buffer that stays in the processor's cache:
    writing them from a memory map instead costs a page fault every few kilobytes.
    """
    table = pq.read_table(part, columns=["uid", "extensions", "offsets", "sizes"])
    kept = pq.read_table(ledger / part.name, columns=["copies"])["copies"].to_numpy() > 0
    table = table.filter(pa.array(kept)).combine_chunks()
    members = np.repeat(np.arange(table.num_rows), lengths := pc.list_value_length(table["sizes"]).to_numpy())
    extensions = pc.list_flatten(table["extensions"]).to_pylist()
    starts, sizes = (pc.list_flatten(table[name]).to_numpy() for name in ("offsets", "sizes"))
    stems = [f"{uid}-{copy}." for uid, copy in zip(table["uid"].to_pylist(), copies[: table.num_rows], strict=True)]
    heads = headers([stems[i] + e for i, e in zip(members.tolist(), extensions, strict=True)], sizes).tobytes()
    layout = list(zip(range(0, len(heads), BLOCK), starts.tolist(), sizes.tolist(), strict=True))
    buffer = bytearray(1 << 20)
    at = 0
    for length in lengths.tolist():
        end = 0
        for head, start, size in layout[at : at + length]:
            begin, end = end + BLOCK, end + BLOCK + padded(size)
            if end > len(buffer):
                buffer = buffer + bytes(end)
            view = memoryview(buffer)
            view[begin - BLOCK : begin] = heads[head : head + BLOCK]
            tape.read_into(view[begin : begin + size], start)
            view[begin + size : end] = ZEROS[: end - begin - size]
        at += length
        yield memoryview(buffer)[:end]


class _Outputs:
    """Open output files, the last used ones, each stretched to its planned size when first opened."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._open: OrderedDict[int, int] = OrderedDict()

    def write(self, output: int, offset: int, content: memoryview) -> None:
        descriptor = self._open.pop(output, None)
        if descriptor is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(self._folder / "shards" / tar_name(output), os.O_WRONLY | os.O_CREAT, 0o644)
            if os.fstat(descriptor).st_size != self._sizes[output]:
                os.ftruncate(descriptor, self._sizes[output])
        self._open[output] = descriptor
        written = 0
        while written < len(content):  # a signal or a full disk may cut it short; the next call then raises
            written += os.pwrite(descriptor, content[written:], offset + written)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def tar_name(output: int) -> str:
    return f"{output:08d}.tar"


def marker(folder: Path, item: Copy) -> Path:
    """The file whose presence says that this input shard is copied."""
    return folder / "done" / item.fingerprint


def prepare(folder: Path) -> None:
    for name in ("shards", "done"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def finish(folder: Path, target: Path, made: Plan) -> None:
    """Write the files beside the tars, check the tars' sizes, and let the shards appear as `target` by one rename."""
    shards = folder / "shards"
    for output, size in enumerate(made.sizes):
        assert (shards / tar_name(output)).stat().st_size == size, tar_name(output)
        _write(shards / f"{output:08d}_stats.json", {"successes": made.samples[output]})
    names = [tar_name(output) for output in range(len(made.sizes))]
    _write(shards / "sizes.json", dict(zip(names, made.samples, strict=True)))
    listed = [{"url": name, "nsamples": n} for name, n in zip(names, made.samples, strict=True)]
    _write(shards / "index.json", {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed})
    _write(
        shards / "meta.json",
        {
            "schema_version": SCHEMA_VERSION,
            "output_shard_count": len(names),
            "output_shard_format": "{:08d}.tar",
        },
    )
    np.save(shards / "sample_ids.npy", made.ids)
    shutil.rmtree(target, ignore_errors=True)
    shards.rename(target)


def _write(path: Path, value: Any) -> None:
    """Plainly: nobody sees the folder before its rename, and a killed `finish` writes all of it again."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def forget(folder: Path) -> None:
    """Remove the markers, once the build's manifest is there."""
    shutil.rmtree(folder, ignore_errors=True)
