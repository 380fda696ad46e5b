"""Drop what a list names: takedown requests by uid or image hash, addresses, whole web domains.

A list may be as long as the pool, so one worker reads it, some lines at a time,
and every worker looks into what it leaves (`curation.selection.listed`). A
domain is looked up as itself and as each of its parents, for the distinct hosts
of the part alone.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import file_hash
from curation.selection.interface import Apart, Fold, Program
from curation.selection.listed import Listed, write_listed
from curation.selection.subset import PAIR, is_subset, numbers, paired
from curation.selection.uids import line_blocks, uid_blocks

# What urllib calls the hostname: after the last @ of what stands before the path, and before the port.
HOST = r"^[\x00-\x20]*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//(?:[^/?#]*@)?(?P<host>\[[^\]/?#]*|[^/?#:]*)"
NOT_IN_DOMAINS = set("/@?:* ")


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """Drop rows whose `column` is named in `file`; a missing value is named by nothing.

    `file`: text in UTF-8, one entry a line; a "#" at the start of a line or after white space begins a comment.
    For `uid` also a DataComp subset (.npy, or without a header) or a parquet with a column `uid`.
    `match`: "exact" compares whole values, text with its case, binary columns (image_sha256) with entries in hex, and
    uids as the numbers that they are for a build (`curation.selection.subset`).
    "domain" drops a URL whose host is an entry or lies below one, whatever the case, user, port or dot at the end;
    international names must be spelled as the URLs spell them.

    Memory: 16 bytes an entry, mapped by the workers.
    """

    column: str
    file: str
    match: Literal["exact", "domain"] = "exact"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise UserError(f"block_list: {self.file}: no such file; name a text file with one entry a line")

    def content(self) -> str:
        return file_hash([Path(self.file)])

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def decide(self) -> Program:
        """The distinct entries as the column has its values; of domains, lower case without dots at the ends."""
        kind = (yield Fold(self._kind, _either)) or pa.string()  # a pool without samples has no parts
        self.check(kind)
        listed: Listed = yield Apart(partial(self._listed, None if pa.types.is_string(kind) else kind))
        return listed

    def check(self, kind: pa.DataType) -> None:
        """Raises: UserError: a column of this type has no values that a list could name."""
        if not pa.types.is_string(kind) and (self.match == "domain" or not _is_bytes(kind)):
            raise UserError(
                f"block_list: column {self.column} is {kind}; match {self.match} needs text"
                + (" or bytes" if self.match == "exact" else "")
            )

    def _kind(self, table: pa.Table) -> pa.DataType:
        return table.schema.field(self.column).type

    def _listed(self, kind: pa.DataType | None, folder: Path) -> Listed:
        """Of entries that are text, or stand for bytes of a kind."""
        file = Path(self.file)
        if self.column == "uid" and (file.suffix == ".parquet" or is_subset(file)):
            blocks: Iterator[list[str]] = (block.to_pylist() for block in uid_blocks(file))
        else:
            blocks = entry_blocks(file)
        if self.column == "uid":
            return write_listed(folder, map(_numbered, blocks))
        value = self._from_domain if self.match == "domain" else str.encode
        return write_listed(folder, (map(value if kind is None else partial(self._from_hex, kind), b) for b in blocks))

    def _from_domain(self, entry: str) -> bytes:
        name = entry.strip(".").lower()
        if not name or NOT_IN_DOMAINS & set(name):
            raise UserError(f"block_list: {self.file}: {name!r} is no domain; write it like example.com")
        return name.encode()

    def _from_hex(self, kind: pa.DataType, entry: str) -> bytes:
        width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else len(entry) // 2
        try:
            value = bytes.fromhex(entry)
        except ValueError:
            value = b""
        if not value or len(value) != width:
            raise UserError(f"block_list: {self.file}: {entry!r} is no {self.column}; write {2 * width} hex digits")
        return value

    def apply(self, table: pa.Table, decision: Listed) -> np.ndarray:
        values = table[self.column]
        if self.match == "domain":
            values = hosts(values)
            listed = _at_or_below(values.unique().drop_null().to_pylist(), decision)
            return ~pc.is_in(values, value_set=listed).to_numpy()
        keep, there = np.ones(len(values), bool), values.is_valid().to_numpy()
        present = values.drop_null()
        if self.column == "uid":
            asked = _numbered(present.to_pylist())
        else:
            asked = (present.cast(pa.binary()) if pa.types.is_string(present.type) else present).to_pylist()
        keep[there] = ~decision.among(asked)
        return keep

    def describe(self, decision: Listed) -> dict[str, Any]:
        return {"listed": decision.count}


def _numbered(uids: list[str]) -> list[bytes]:
    """The 16 bytes of each uid's number."""
    raw = paired(*numbers(uids)).tobytes()
    return [raw[start : start + PAIR.itemsize] for start in range(0, len(raw), PAIR.itemsize)]


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _either(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """All parts have one schema."""
    return a


def entry_blocks(path: Path) -> Iterator[list[str]]:
    """The entries of a list, in its order, those of some lines at a time.

    Raises:
        UserError: the file is not text.
    """
    try:
        for lines in line_blocks(path):
            yield [entry for line in lines if (entry := re.sub(r"(^|\s)#.*", "", line).strip())]
    except (OSError, UnicodeDecodeError) as reason:
        raise UserError(f"block_list: {path}: cannot be read as a list ({reason}); save it as UTF-8 text") from None


def hosts(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The host of each URL, lower case without dots and brackets at the ends; null where there is none."""
    found = pc.struct_field(pc.extract_regex(urls, HOST), "host")
    return pc.utf8_lower(pc.utf8_trim(found, "[]."))


def _at_or_below(names: list[str], listed: Listed) -> pa.Array:
    """Those of these hosts that are an entry or a subdomain of one, as often as they match."""
    asked, whose = [], []
    for name in names:
        labels = name.split(".")
        asked += [".".join(labels[n:]).encode() for n in range(len(labels))]
        whose += [name] * len(labels)
    return pa.array(list(itertools.compress(whose, listed.among(asked).tolist())), pa.string())
