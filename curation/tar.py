"""Tar shards as byte ranges: which member of which sample lies where.

Measuring, building, training and grading all read shards through this index.
It walks the headers and touches no payload, so a sample can
be read, or copied raw into another tar, by offset alone. `tarfile` would build
an object of twenty fields per member and cannot say what is left of a
truncated file; webdataset's reader gives no offsets.

Pools and training data are read by calls (`Tape`), output shards and held-out
ones through a memory map: where a disk fails, or a file is cut while it is
read, a call says so, and a map ends the process by SIGBUS.

Samples are grouped by key over the whole shard because img2dataset writes the
members of one sample in any order. ustar, GNU long names and PAX headers are
understood.
"""

import mmap
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""The members that are a sample's image, the preferred first."""
REGULAR, DIRECTORY = (b"0", b"\0", b"7"), b"5"
APPLE_DOUBLE = "._"
"""So begins the name that macOS's tar puts beside every member, with what its disks know of the file."""
LONGEST_PADDING = 1 << 20
"""Zeros at the end of an archive, at most: tar fills a record with them, 10 KiB, or on tapes up to a MiB."""
UNREAD = "cannot be read"
PAUSES = (0.5, 1.0, 2.0)  # seconds before a read that failed is tried again, once a tape: a disk may come back


class Tape:
    """A local file's bytes, read as they are asked for, also when the file is closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._size, self._pauses = os.fstat(self._descriptor).st_size, iter(PAUSES)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        """
        Raises:
            OSError: a read fails, and again; or the file has become shorter.
        """
        start, stop, _ = place.indices(self._size)
        found = self._read(start, max(0, stop - start))
        while len(found) < stop - start:  # one call gives no more than 2 GiB
            more = self._read(start + len(found), stop - start - len(found))
            if not more:
                raise OSError(f"the file ended at byte {start + len(found)} of {self._size}")
            found += more
        return found

    def _read(self, start: int, size: int) -> bytes:
        while True:
            try:
                return os.pread(self._descriptor, size, start)
            except OSError:
                if (pause := next(self._pauses, None)) is None:
                    raise
                time.sleep(pause)


Mapped = bytes | mmap.mmap
Bytes = Mapped | Tape


class TarDamage(Exception):
    """The archive cannot be read past this point; the message says why."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar: its name, where its bytes begin and how many there are."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Sample:
    """The members that share a key, by extension; `error` names what is wrong with the grouping."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    error: str | None = None


def _number(raw: bytes) -> int:
    """A header number: octal text, or GNU's base-256 for sizes of 8 GiB and more."""
    if raw[0] & 0x80:
        return int.from_bytes(raw[1:], "big") + ((raw[0] & 0x7F) << (8 * (len(raw) - 1)))
    text = raw.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():  # `int` would take a sign, and walk backwards
        raise ValueError
    return int(text, 8) if text else 0


def _pax_records(payload: bytes) -> dict[str, str]:
    """The records "LENGTH NAME=VALUE\\n" up to the end or a NUL; no checksum covers them, so all is checked.

    Raises:
        ValueError: the payload is not made of such records.
    """
    records = {}
    at = 0
    while at < len(payload) and payload[at]:
        blank = payload.find(b" ", at, at + 20)
        length = payload[at : max(blank, at)]
        end = at + int(length) if length.isdigit() else 0
        if not blank + 1 < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise ValueError
        name, equals, value = payload[blank + 1 : end - 1].partition(b"=")
        if not equals:
            raise ValueError
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at = end
    if not records.get("size", "0").isdecimal():
        raise ValueError
    return records


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def members(data: Bytes) -> Iterator[Member]:
    """The regular files of a tar, in order.

    Raises:
        TarDamage: as `_entries`.
    """
    return (member for kind, member in _entries(data) if kind in REGULAR)


def _entries(data: Bytes) -> Iterator[tuple[bytes, Member]]:
    """Everything in a tar that has a name, with its kind, in order.

    Raises:
        TarDamage: after the last whole member, where the archive is truncated,
            lacks its end or a header or its PAX records do not check; or where
            more follows on its end than padding, as in archives that were put
            one behind the other, and in a file whose rest did not come yet.
    """
    position, total = 0, len(data)
    long_name: str | None = None
    long_size: int | None = None
    while position < total:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise TarDamage(f"truncated header at byte {position}")
        if header[0] == 0 and not any(header):
            behind = total - position
            if behind > LONGEST_PADDING or data[position:total].strip(b"\0"):
                raise TarDamage(f"the archive ends at byte {position}, and {behind} bytes follow")
            return
        try:
            stored, size = _number(header[148:156]), _number(header[124:136])
        except ValueError:
            raise TarDamage(f"unreadable header at byte {position}") from None
        if stored != sum(header) - sum(header[148:156]) + 8 * 32:
            raise TarDamage(f"header checksum differs at byte {position}")
        kind, start = header[156:157], position + BLOCK
        if kind in REGULAR and long_size is not None:
            size = long_size
        if start + size > total:
            raise TarDamage(f"truncated member at byte {position}")
        if kind == b"x":
            try:
                records = _pax_records(data[start : start + size])
            except ValueError:
                raise TarDamage(f"unreadable PAX header at byte {position}") from None
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else None
        elif kind == b"L":
            long_name = _text(data[start : start + size])
        elif kind not in (b"g", b"K"):  # a header for all that follows, and the long target of a link
            name = long_name
            if name is None:
                prefix = _text(header[345:500]) if header[257:262] == b"ustar" else ""
                name = f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])
            yield kind, Member(name, start, size)
            long_name = long_size = None
        position = start + padded(size)
    raise TarDamage(f"no end-of-archive block by byte {total}")


def split_name(name: str) -> tuple[str, str]:
    """webdataset's key and extension: the base name splits at its first dot, "a/b.seg.png" -> ("a/b", "seg.png")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def samples(data: Bytes, *, strays: bool = False) -> tuple[list[Sample], str | None]:
    """All samples of a shard in the order of their first members, and what damaged the rest of it (or None).

    A key that repeats an extension starts a sample of its own with the error
    "duplicate_key"; member names that leave the folder give "unsafe_name".

    Args:
        strays: also what no loader sees. A member without an extension, or with nothing before it, is a sample without
            members, "stray_member"; a link or a device makes the sample that it is named for "not_a_file". AppleDouble
            members are passed over all the same, as webdataset does.
    """
    by_key: dict[str, Sample] = {}
    found: list[Sample] = []
    damage = None
    try:
        for kind, member in _entries(data):
            if kind == DIRECTORY or member.name.endswith("/") or not (strays or kind in REGULAR):
                continue
            unsafe = "unsafe_name" if member.name.startswith("/") or ".." in member.name.split("/") else None
            key, extension = split_name(member.name)
            base = member.name.rpartition("/")[2]
            if not extension or base.startswith("."):
                if strays and not base.startswith(APPLE_DOUBLE):
                    found.append(Sample(member.name, error=unsafe or "stray_member"))
                continue
            sample = by_key.get(key)
            if sample is None or extension in sample.members:
                repeated = sample is not None
                sample = Sample(key, error="duplicate_key" if repeated else None)
                by_key[key] = sample
                found.append(sample)
            if kind in REGULAR:
                sample.error = unsafe or sample.error
                sample.members[extension] = member
            else:
                sample.error = unsafe or sample.error or "not_a_file"
    except TarDamage as reason:
        damage = str(reason)
    except OSError as reason:
        damage = f"{UNREAD} beyond its first {len(found)} samples ({reason})"
    return found, damage


def open_tape(path: str | Path) -> Bytes:
    """A local tar to be read by calls."""
    with open(path, "rb") as file:
        return Tape(file)


def open_shard(path: str | Path) -> Mapped:
    """A read-only memory map of a local tar (empty bytes for an empty file)."""
    with open(path, "rb") as file:
        return mapped(file)


def mapped(file: IO[bytes]) -> Mapped:
    """A local file's bytes, which may be used when it is closed."""
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def headers(names: Sequence[str] | pa.Array, sizes: np.ndarray) -> np.ndarray:
    """ustar headers of regular files, uint8 [n, 512]: mode 0644, without owner or time, so that equal inputs give
    equal tars. All at once: a build writes one for every member, and field by field they take several times as long.

    A name is at most 100 bytes (ours are a 32-digit uid, a copy number and an extension); sizes int64 [n] in bytes.
    """
    padded = pc.ascii_rpad(pa.array(names, pa.string()), 100, padding="\0")  # by bytes, whatever they are
    called = np.frombuffer(padded.buffers()[2] or b"", np.uint8)
    assert len(called) == 100 * len(sizes) and sizes.max(initial=0) < 8**11, "beyond a ustar header"
    called, digits = called.reshape(-1, 100), _octal(sizes, 11)
    blocks = np.zeros((len(sizes), BLOCK), np.uint8)
    blocks[:, :100] = called
    blocks[:, 100:265] = np.frombuffer(_SAME, np.uint8)
    blocks[:, 124:135] = digits
    # Of all bytes, with blanks in its own place and zeros in that of the size.
    total = sum(_SAME) - 11 * ord("0") + called.sum(axis=1, dtype=np.int64) + digits.sum(axis=1, dtype=np.int64)
    blocks[:, 148:154] = _octal(total, 6)
    blocks[:, 154] = 0
    return blocks


def header(name: str, size: int) -> bytes:
    """One header; see `headers`."""
    return headers([name], np.array([size])).tobytes()


_SAME = b"0000644\0" + b"0000000\0" * 2 + b"00000000000\0" * 2 + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
"""Bytes 100 to 265 of every header of ours: mode, owner, size and time (0), blanks for the checksum, kind, magic."""


def _octal(values: np.ndarray, digits: int) -> np.ndarray:
    """Text of so many octal digits, uint8 [n, digits]."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((values[:, None] >> shifts) & 7).astype(np.uint8) + ord("0")


END = bytes(2 * BLOCK)
"""Two empty blocks close a tar."""


def padded(size: int) -> int:
    """Bytes that a payload of this size takes in a tar."""
    return -(-size // BLOCK) * BLOCK
