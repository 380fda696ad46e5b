"""Drop what a list names: takedown requests by uid or image hash, addresses, whole web domains.

The list is read once, where the decision is made, and both ways to match end in
one set lookup of Arrow for each part: a domain is looked up as itself and as
each of its parents, for the distinct hosts of the part alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import file_hash
from curation.selection.interface import Fold, Program
from curation.selection.uids import read_uids

# What urllib calls the hostname: after the last @ of what stands before the path, and before the port.
HOST = r"^[\x00-\x20]*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//(?:[^/?#]*@)?(?P<host>\[[^\]/?#]*|[^/?#:]*)"
NOT_IN_DOMAINS = set("/@?:* ")


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """Drop rows whose `column` is named in `file`; a missing value is named by nothing.

    `file`: text in UTF-8, one entry a line; a "#" at the start of a line or after white space begins a comment.
    For `uid` also a DataComp subset (.npy) or a parquet with a column `uid`.
    `match`: "exact" compares whole values, text with its case, and binary columns (image_sha256) with entries in hex.
    "domain" drops a URL whose host is an entry or lies below one, whatever the case, user, port or dot at the end;
    international names must be spelled as the URLs spell them.
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
        """The entries, distinct, as the column has its values; of domains, lower case without dots at the ends."""
        kind = (yield Fold(self._kind, _either)) or pa.string()  # a pool without samples has no parts
        file = Path(self.file)
        columnar = self.column == "uid" and file.suffix in (".npy", ".parquet")
        entries = read_uids(file).to_pylist() if columnar else read_entries(file)
        text = pa.types.is_string(kind)
        if self.match == "domain" and text:
            entries = [e.strip(".").lower() for e in entries]
            if wrong := [e for e in entries if not e or NOT_IN_DOMAINS & set(e)]:
                raise UserError(f"block_list: {self.file}: {wrong[0]!r} is no domain; write it like example.com")
            return pa.array(sorted(set(entries)), pa.string())
        if self.match == "exact" and text:
            return pa.array(sorted(set(entries)), pa.string())
        if self.match == "exact" and (pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)):
            return pa.array(sorted({self._from_hex(e, kind) for e in entries}), kind)
        raise UserError(
            f"block_list: column {self.column} is {kind}; match {self.match} needs text"
            + (" or bytes" if self.match == "exact" else "")
        )

    def _kind(self, table: pa.Table) -> pa.DataType:
        return table.schema.field(self.column).type

    def _from_hex(self, entry: str, kind: pa.DataType) -> bytes:
        width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else len(entry) // 2
        try:
            value = bytes.fromhex(entry)
        except ValueError:
            value = b""
        if not value or len(value) != width:
            raise UserError(f"block_list: {self.file}: {entry!r} is no {self.column}; write {2 * width} hex digits")
        return value

    def apply(self, table: pa.Table, decision: pa.Array) -> np.ndarray:
        values, listed = table[self.column], decision
        if self.match == "domain":
            values = hosts(values)
            listed = _at_or_below(values.unique().drop_null().to_pylist(), decision)
        return ~pc.is_in(values, value_set=listed).to_numpy()

    def describe(self, decision: pa.Array) -> dict[str, Any]:
        return {"listed": len(decision)}


def _either(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """All parts have one schema."""
    return a


def read_entries(path: Path) -> list[str]:
    """The entries of a list, in its order.

    Raises:
        UserError: the file is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise UserError(f"block_list: {path}: cannot be read as a list ({reason}); save it as UTF-8 text") from None
    return [entry for line in lines if (entry := re.sub(r"(^|\s)#.*", "", line).strip())]


def hosts(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The host of each URL, lower case without dots and brackets at the ends; null where there is none."""
    found = pc.struct_field(pc.extract_regex(urls, HOST), "host")
    return pc.utf8_lower(pc.utf8_trim(found, "[]."))


def _at_or_below(names: list[str], entries: pa.Array) -> pa.Array:
    """Those of these hosts that are an entry or a subdomain of one, as often as they match."""
    asked, whose = [], []
    for name in names:
        labels = name.split(".")
        asked += [".".join(labels[n:]) for n in range(len(labels))]
        whose += [name] * len(labels)
    return pa.array(whose, pa.string()).filter(pc.is_in(pa.array(asked, pa.string()), value_set=entries))
