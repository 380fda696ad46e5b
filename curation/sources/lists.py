"""Rows of a list of captions (csv, tsv or jsonl), each with the bytes that it takes, so that a stretch is read alone.

A list is read from end to end once, where the pool is listed. A shard of it then
reads its own bytes, and of a csv the header: what a shard costs does not grow
with the list, and of one behind a URL only that much is fetched.

A row that cannot be read costs nothing but itself. In a csv, a quote that is not
closed would take along all lines up to the next one, as one field, or up to the
131,072 characters that a field may have; so lines are joined to a row only where
its quotes are as RFC 4180 has them, and else the first of them is a row by
itself, sound or broken.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any, Self

from curation import files

LISTS = (".csv", ".tsv", ".jsonl")
BROKEN = "list_row_broken"
HEADER = 1 << 16  # bytes within which a header ends
BOM = b"\xef\xbb\xbf"
Row = tuple[int, int, dict[str, Any] | str]  # its first byte, the one after its last, and what it says, or BROKEN
Fields = Iterator[tuple[int, int, list[str] | None]]


class ListDamage(Exception):
    """The list cannot be read; the message is "list_unreadable: " and why."""


def is_list(name: str) -> bool:
    return name.endswith(LISTS)


def all_rows(base: str) -> Iterator[Row]:
    """The rows of a list in order; empty ones are none.

    Raises:
        ListDamage: it cannot be opened, or has no header.
    """
    try:
        raw = files.fetched(base)
    except OSError as reason:
        raise _unreadable(reason) from None
    if base.endswith(".jsonl"):
        return _json_rows(raw, 0)
    fields = _fields(raw, 0, _delimiter(base))
    return _named(_header(fields), fields)


def rows_between(base: str, start: int, end: int) -> Iterator[Row]:
    """The rows that lie at these bytes, as `all_rows` gives them.

    Raises:
        ListDamage: as `all_rows`.
    """
    try:
        head = files.read(base, 0, HEADER)  # of a jsonl, to see whether it can be read
        raw = io.BytesIO(files.read(base, start, end - start) if end > start else b"")
    except OSError as reason:
        raise _unreadable(reason) from None
    if base.endswith(".jsonl"):
        return _json_rows(raw, start)
    delimiter = _delimiter(base)
    return _named(_header(_fields(io.BytesIO(head), 0, delimiter)), _fields(raw, start, delimiter))


def _unreadable(reason: OSError) -> ListDamage:
    return ListDamage(f"list_unreadable: {reason.strerror or type(reason).__name__}")


def _delimiter(base: str) -> str:
    return "\t" if base.endswith(".tsv") else ","


def _header(fields: Fields) -> list[str]:
    """The first row's fields; a header that is longer than what a shard reads of it is none."""
    _, end, names = next(fields, (0, 0, []))
    if names is None or end >= HEADER:
        raise ListDamage(f"list_unreadable: no header of csv within {HEADER} bytes")
    return names


def _named(header: list[str], fields: Fields) -> Iterator[Row]:
    """Rows as mappings; one with more or fewer fields than the header has is broken."""
    for start, end, row in fields:
        yield start, end, BROKEN if row is None or len(row) != len(header) else dict(zip(header, row))


def _fields(raw: IO[bytes], at: int, delimiter: str) -> Fields:
    """The fields of each row from here on, where `at` is the byte at which `raw` begins; None where it is broken."""
    with raw:
        if at == 0:
            at = len(BOM) if raw.read(len(BOM)) == BOM else 0
            raw.seek(at)
        lines = _Lines(raw)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            try:
                row = next(rows, None)
            except csv.Error:
                lines.give_back()
                row = _alone(lines.taken[0], delimiter)
            taken, lines.taken = lines.taken, []
            if not taken:
                return
            start, at = at, at + sum(map(len, taken))
            if row != []:
                yield start, at - _line_end(taken[-1]), row


def _alone(line: bytes, delimiter: str) -> list[str] | None:
    """The fields of a line with odd quotes; None where the last is still open, or a field is too long."""
    lines = _Lines(io.BytesIO(line))
    try:
        row = next(csv.reader(lines, delimiter=delimiter))
    except csv.Error:
        return None
    return None if lines.ended else row


class _Lines:
    """Lines as text. csv.reader asks for no more of them than its row needs, so those are known: `taken`."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._lines = (part for line in raw for part in line.splitlines(keepends=True))  # at a lone \r too, as csv does
        self._again: list[bytes] = []  # the next one last
        self.taken: list[bytes] = []
        self.ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.taken.append(line)
        return line.decode("utf-8", "surrogateescape")

    def give_back(self) -> None:
        """All that were taken but the first come again."""
        self._again += reversed(self.taken[1:])
        del self.taken[1:]


def _json_rows(raw: IO[bytes], at: int) -> Iterator[Row]:
    with raw:
        for line in raw:
            start, at = at, at + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield start, at - _line_end(line), row if isinstance(row, dict) else BROKEN


def _line_end(line: bytes) -> int:
    """Bytes of the line's end, which are no part of a row: it stays where it is when a list grows after it."""
    return len(line) - len(line.rstrip(b"\r\n"))
