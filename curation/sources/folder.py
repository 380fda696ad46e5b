"""A folder of files as shards: so many entries of its list are one, and the tape is their files' bytes end to end.

Either a list says what there is, `metadata.csv`, `metadata.jsonl`, `captions.*`
or any one file in the place of a pool: a row names a picture (`file_name`, by
its path from the list) and its caption (`text` or `caption`), or says a text
alone; all its columns become the json. Or the files themselves do: those that
share a stem are a sample, as in a tar, `a/b.jpg` with `a/b.txt` and `a/b.json`.

A shard is called BASE#FIRST-END, where BASE is the list or the folder and FIRST
and END count its entries: rows that are added at the end of a list leave its
earlier shards as they were. An entry's number is the upper part of a position.
"""

import csv
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, Self

from curation import files
from curation.errors import UserError
from curation.files import File
from curation.hashing import config_hash
from curation.sources.rows import CAPTION_COLUMNS, first_of, record_of, record_text
from curation.tar import IMAGE_EXTENSIONS, Member, Sample

VERSION = 2  # goes up when the same folder gives other members
SHARD_ENTRIES = 5_000
ENTRY_BITS = 40  # of a position within an entry
FILE_COLUMNS = ("file_name", "filename", "image", "image_path", "filepath", "path")
LISTS = (".csv", ".tsv", ".jsonl")
_RANGE = re.compile(r"(.+)#(\d+)-(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample: by extension a file or bytes, in the order of the tape."""

    key: str
    parts: Mapping[str, File | bytes] = field(default_factory=dict)
    error: str | None = None


def is_range(name: str) -> bool:
    return _RANGE.fullmatch(name) is not None


def is_list(name: str) -> bool:
    return name.endswith(LISTS)


def folder_shards(base: str) -> list[tuple[str, str, int]]:
    """(name, fingerprint, bytes) of the shards of a list or a folder of files, in order.

    Raises:
        UserError: the list has no column that this reads.
    """
    found: list[tuple[str, str, int]] = []
    entries, damage = _entries(base)
    while chunk := list(islice(entries, SHARD_ENTRIES)):
        first = len(found) * SHARD_ENTRIES
        name = f"{base}#{first}-{first + len(chunk)}"
        found.append((name, *_sum_up(name, chunk)))
    if damage and not found:
        found.append((f"{base}#0-0", *_sum_up(f"{base}#0-0", [])))
    return found


def _sum_up(name: str, entries: Sequence[Entry]) -> tuple[str, int]:
    """A shard's fingerprint and bytes. Its name is in it, since texts in a list need be no different elsewhere."""
    parts = [(e.key, e.error, [(x, _plain(part)) for x, part in e.parts.items()]) for e in entries]
    size = sum(_size(part) for entry in entries for part in entry.parts.values())
    return config_hash([VERSION, name, parts]), size


def _plain(part: File | bytes) -> list[Any] | str:
    return part.decode("latin-1") if isinstance(part, bytes) else [part.name, part.size, part.stamp]


def _size(part: File | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.size


def _range_of(name: str) -> tuple[list[Entry], list[str]]:
    """The entries of a shard, and what is wrong with its list beyond them."""
    found = _RANGE.fullmatch(name)
    assert found is not None, name
    entries, damage = _entries(found[1])
    first, end = int(found[2]), int(found[3])
    chosen = list(islice(entries, first, end))
    if next(entries, None) is not None:
        return chosen, []  # what is wrong is said by the last shard
    return chosen, damage


def _entries(base: str) -> tuple[Iterator[Entry], list[str]]:
    """The entries of a list or a folder, and a list that says what damaged the rest once they are through."""
    damage: list[str] = []
    if not is_list(base):
        return _by_stem(base), damage
    try:
        raw = files.fetched(base)
    except OSError as reason:
        damage.append(f"list_unreadable: {reason.strerror or type(reason).__name__}")
        return iter(()), damage
    folder = base.rpartition("/")[0]
    rows = (
        _json_rows(raw) if base.endswith(".jsonl") else _csv_rows(raw, "\t" if base.endswith(".tsv") else ",", damage)
    )
    there: dict[str, File] | None = None
    if files.is_remote(base):  # one listing instead of a request for each row
        there = {file.name: file for file in files.listed(folder, deep=True) or ()}
    return _by_row(base, folder, rows, there), damage


def _by_stem(folder: str) -> Iterator[Entry]:
    """Pictures, texts and jsons of a folder and the folders in it, by their stems; each other file that goes with none
    of them is an entry too, since it may be a picture that this does not know."""
    groups: dict[str, dict[str, File]] = {}
    others: dict[str, str] = {}  # file -> stem
    for file in files.listed(folder, deep=True) or ():
        name = file.name[len(folder) + 1 :]
        key, extension = _split(name)
        if extension in (*IMAGE_EXTENSIONS, "txt", "json"):
            groups.setdefault(key, {})[extension] = file
        else:
            others[name.encode("utf-8", "replace").decode()] = key
    lost = {key for key, parts in groups.items() if any(f.stamp == files.NOWHERE for f in parts.values())}
    entries = [Entry(key=key, parts=groups[key], error="unreadable" if key in lost else None) for key in groups]
    if groups:  # else it is no such folder, and refused
        entries += [Entry(key=name, error="image_unknown_format") for name, key in others.items() if key not in groups]
    return iter(sorted(entries, key=lambda entry: entry.key))


def _by_row(
    base: str, folder: str, rows: Iterator[dict[str, Any] | str], there: Mapping[str, File] | None
) -> Iterator[Entry]:
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield Entry(key=f"{number:09d}", error=row)
            continue
        if number == 0 and not first_of((*FILE_COLUMNS, *CAPTION_COLUMNS), row):
            raise UserError(
                f"--pool {base}: has neither a column of files ({', '.join(FILE_COLUMNS)}) nor of texts "
                f"({', '.join(CAPTION_COLUMNS)}) but {', '.join(map(str, row))[:200]!a}; name them so"
            )
        yield _entry(f"{number:09d}", row, folder, there)


def _entry(number: str, row: dict[str, Any], folder: str, there: Mapping[str, File] | None) -> Entry:
    parts: dict[str, File | bytes] = {}
    key, error = number, None
    name, caption = (row.get(first_of(columns, row) or "") for columns in (FILE_COLUMNS, CAPTION_COLUMNS))
    if isinstance(name, str) and name:
        key, extension = _split(name)
        if name.startswith("/") or ".." in name.split("/") or "\0" in name or files.is_remote(name):
            error = "unsafe_name"
        elif extension not in IMAGE_EXTENSIONS:
            error = "image_unknown_format"
        else:
            full = f"{folder}/{name.removeprefix('./')}"
            file = there.get(full) if there is not None else files.look(full)
            if file is None:
                error = "image_missing"
            else:
                parts[extension] = file
    if isinstance(caption, str):
        parts["txt"] = caption.encode("utf-8", "surrogateescape" if _escaped(caption) else "surrogatepass")
    parts["json"] = record_text(record_of(row))
    return Entry(key=key, parts=parts, error=error)


def _split(name: str) -> tuple[str, str]:
    """What a file is called without its last extension, as text, and the extension."""
    stem, _, extension = name.rpartition(".")
    return stem.encode("utf-8", "replace").decode(), extension.lower()


def _escaped(text: str) -> bool:
    """Whether its only surrogates are the bytes that were no UTF-8 in the file."""
    return all("\udc80" <= c <= "\udcff" for c in text if "\ud800" <= c <= "\udfff")


def _csv_rows(raw: IO[bytes], delimiter: str, damage: list[str]) -> Iterator[dict[str, Any] | str]:
    """Rows as mappings; one with more or fewer fields than the header has is the reason "list_row_broken"."""
    with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter)
        header: list[str] = []
        while True:
            try:
                row = next(rows, None)
            except csv.Error as reason:
                damage.append(f"list_unreadable: {reason} in line {rows.line_num}")
                return
            if row is None:
                return
            if not header:
                header = row
            elif row:
                yield dict(zip(header, row)) if len(row) == len(header) else "list_row_broken"


def _json_rows(raw: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    with raw:
        for line in raw:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else "list_row_broken"


class FolderSource:
    """Reads a file where a range of it is asked for; after `fetch`, all of a remote shard is here."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries, self._damage = _range_of(name)
        self._fetched: IO[bytes] | None = None
        self._places: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fetched is not None:
            self._fetched.close()

    def samples(self) -> tuple[list[Sample], str | None]:
        found = []
        for number, entry in enumerate(self._entries):
            sample = Sample(entry.key, error=entry.error)
            at = number << ENTRY_BITS
            for extension, part in entry.parts.items():
                sample.members[extension] = Member("", at, _size(part))
                at += _size(part)
            found.append(sample)
        return found, next(iter(self._damage), None)

    def __getitem__(self, place: slice, /) -> bytes:
        number, at = place.start >> ENTRY_BITS, place.start & ((1 << ENTRY_BITS) - 1)
        size = place.stop - place.start
        if size == 0:
            return b""
        entry = self._entries[number] if number < len(self._entries) else Entry(key="")
        for part in entry.parts.values():
            if at < _size(part):
                found = part[at : at + size] if isinstance(part, bytes) else self._read(part, at, size)
                if len(found) != size:
                    raise OSError(f"{part.name if isinstance(part, File) else number} ends before byte {at + size}")
                return found
            at -= _size(part)
        raise OSError(f"entry {number} of the shard ends before that")

    def read_into(self, view: memoryview, start: int) -> None:
        view[:] = self[start : start + len(view)]

    def _read(self, file: File, at: int, size: int) -> bytes:
        if self._fetched is None:
            return files.read(file.name, at, size)
        self._fetched.seek(self._places[file.name] + at)
        return self._fetched.read(size)

    def fingerprint(self) -> str:
        return _sum_up(self._name, self._entries)[0]

    def fetch(self) -> None:
        """Remote files into one temporary file, many at a time.

        Raises:
            UserError: one has another size than the listing had.
        """
        wanted = {part.name: part for entry in self._entries for part in entry.parts.values() if isinstance(part, File)}
        if not any(files.is_remote(name) for name in wanted):
            return
        self._fetched = tempfile.TemporaryFile(prefix="gemsmith-")  # noqa: SIM115
        for file, content in zip(wanted.values(), files.together(files.read, list(wanted)), strict=True):
            if len(content) != file.size:
                raise UserError(f"--pool: {file.name} has changed since it was listed; curate into a new --out")
            self._places[file.name] = self._fetched.tell()
            self._fetched.write(content)
