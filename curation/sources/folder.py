"""A folder of files as shards: so many entries of its list are one, and the tape is their files' bytes end to end.

Either a list says what there is, `metadata.csv`, `metadata.jsonl`, `captions.*`
or any one file in the place of a pool: a row names a picture (`file_name`, by
its path from the list) and its caption (`text` or `caption`), or says a text
alone; all its columns become the json. Or the files themselves do: those that
share a stem are a sample, as in a tar, `a/b.jpg` with `a/b.txt` and `a/b.json`.

A shard is called BASE#FIRST-END, where BASE is the list or the folder and FIRST
and END count its entries, and of a list BASE#FIRST-END@BYTE-BYTE, where they lie
in it: rows that are added at its end leave its earlier shards as they were. An
entry's number is the upper part of a position.

A shard costs what its own entries do, however large the pool is: of a list it
reads those bytes, of a folder a process keeps the names that it found there, and
what each file is now (size and stamp) is asked anew, for these entries alone.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import IO, Any, ClassVar, Self

from curation import files
from curation.errors import UserError
from curation.files import File
from curation.hashing import config_hash
from curation.sources.entries import FILE_COLUMNS, Draft, Entry, by_stem, looked_for, of_names, of_rows
from curation.sources.lists import ListDamage, all_rows, is_list, rows_between
from curation.sources.rows import CAPTION_COLUMNS, first_of
from curation.tar import Member, Sample

VERSION = 3  # goes up when the same folder gives other members
SHARD_ENTRIES = 5_000
ENTRY_BITS = 40  # of a position within an entry
_RANGE = re.compile(r"(.+)#(\d+)-(\d+)(?:@(\d+)-(\d+))?", re.DOTALL)


def is_range(name: str) -> bool:
    return _RANGE.fullmatch(name) is not None


def entries_in(name: str) -> int:
    """How many entries a shard has; none where its list cannot be read."""
    found = _RANGE.fullmatch(name)
    assert found is not None, name
    return int(found[3]) - int(found[2])


def pool_order(name: str) -> tuple[str, int]:
    """What shards are sorted by: a range by its first entry as a number, since as texts 10000 is before 5000."""
    found = _RANGE.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 0)


def folder_shards(base: str) -> list[tuple[str, str, int]]:
    """(name, fingerprint, bytes) of the shards of a list or a folder of files, in order.

    Raises:
        UserError: the list has no column that this reads.
    """
    forget_names()
    listing: Sequence[File] = ()
    if not is_list(base):
        listing = files.listed(base, deep=True) or ()
    elif files.is_remote(base):  # one listing instead of a request for each row
        listing = files.listed(_folder_of(base), deep=True) or ()
    there = {file.name: file for file in listing if file.stamp != files.NOWHERE}
    shards = _list_shards(base) if is_list(base) else _name_shards(base, by_stem(base, listing))
    try:
        return [(name, *_sum_up(name, looked_for(drafts, there))) for name, drafts in shards]
    except ListDamage:
        name = f"{base}#0-0"
        return [(name, *_sum_up(name, []))]


def _list_shards(base: str) -> Iterator[tuple[str, list[Draft]]]:
    found, first = all_rows(base), 0
    while chunk := list(islice(found, SHARD_ENTRIES)):
        rows, end = [row for _, _, row in chunk], first + len(chunk)
        said = next((row for row in rows if isinstance(row, dict)), None)
        if first == 0 and said is not None and not first_of((*FILE_COLUMNS, *CAPTION_COLUMNS), said):
            raise UserError(
                f"--pool {base}: has neither a column of files ({', '.join(FILE_COLUMNS)}) nor of texts "
                f"({', '.join(CAPTION_COLUMNS)}) but {', '.join(map(str, said))[:200]!a}; name them so"
            )
        yield f"{base}#{first}-{end}@{chunk[0][0]}-{chunk[-1][1]}", of_rows(_folder_of(base), first, rows)
        first = end


def _name_shards(base: str, names: Sequence[str]) -> Iterator[tuple[str, list[Draft]]]:
    for first in range(0, len(names), SHARD_ENTRIES):
        chunk = names[first : first + SHARD_ENTRIES]
        yield f"{base}#{first}-{first + len(chunk)}", [of_names(base, one) for one in chunk]


def _shard(name: str) -> tuple[list[Draft], str | None]:
    """The entries of a shard, and what is wrong with its list."""
    found = _RANGE.fullmatch(name)
    assert found is not None, name
    base, first, end = found[1], int(found[2]), int(found[3])
    if not is_list(base):
        return [of_names(base, names) for names in _names_in(base)[first:end]], None
    try:
        rows = rows_between(base, int(found[4] or 0), int(found[5] or 0))
        return of_rows(_folder_of(base), first, (row for _, _, row in rows)), None
    except ListDamage as damage:
        return [], str(damage)


@lru_cache(maxsize=1)
def _names_in(folder: str) -> list[str]:
    return by_stem(folder, files.listed(folder, deep=True) or ())


def forget_names() -> None:
    """What this process knows of a folder may be older than the pool's listing."""
    _names_in.cache_clear()


def _sum_up(name: str, entries: Sequence[Entry]) -> tuple[str, int]:
    """A shard's fingerprint and bytes. Its name is in it, since texts in a list need be no different elsewhere."""
    parts = [(e.key, e.error, [(x, _plain(part)) for x, part in e.parts.items()]) for e in entries]
    size = sum(_size(part) for entry in entries for part in entry.parts.values())
    return config_hash([VERSION, name, parts]), size


def _plain(part: File | bytes) -> list[Any] | str:
    return part.decode("latin-1") if isinstance(part, bytes) else [part.name, part.size, part.stamp]


def _size(part: File | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.size


def _folder_of(base: str) -> str:
    return base.rpartition("/")[0]


class FolderSource:
    """Reads a file where a range of it is asked for; after `fetch`, all of a remote shard is here."""

    headers: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._drafts, self._damage = _shard(name)
        self._entries: list[Entry] | None = None  # until all are needed, each is looked for by itself
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
        for number, entry in enumerate(self._all()):
            sample = Sample(entry.key, error=entry.error)
            at = number << ENTRY_BITS
            for extension, part in entry.parts.items():
                sample.members[extension] = Member("", at, _size(part))
                at += _size(part)
            found.append(sample)
        return found, self._damage

    def __getitem__(self, place: slice, /) -> bytes:
        number, at = place.start >> ENTRY_BITS, place.start & ((1 << ENTRY_BITS) - 1)
        size = place.stop - place.start
        if size == 0:
            return b""
        for part in self._parts(number):
            if at < _size(part):
                found = part[at : at + size] if isinstance(part, bytes) else self._read(part, at, size)
                if len(found) != size:
                    raise OSError(f"{part.name if isinstance(part, File) else number} ends before byte {at + size}")
                return found
            at -= _size(part)
        raise OSError(f"entry {number} of the shard ends before that")

    def read_into(self, view: memoryview, start: int) -> None:
        view[:] = self[start : start + len(view)]

    def _all(self) -> list[Entry]:
        if self._entries is None:
            self._entries = looked_for(self._drafts, {})
        return self._entries

    def _parts(self, number: int) -> Iterable[File | bytes]:
        one = slice(number, number + 1)
        entries = self._entries[one] if self._entries is not None else looked_for(self._drafts[one], {})
        return entries[0].parts.values() if entries else ()

    def _read(self, file: File, at: int, size: int) -> bytes:
        if self._fetched is None:
            return files.read(file.name, at, size)
        self._fetched.seek(self._places[file.name] + at)
        return self._fetched.read(size)

    def fingerprint(self) -> str:
        return _sum_up(self._name, self._all())[0]

    def fetch(self) -> None:
        """Remote files into one temporary file, many at a time.

        Raises:
            UserError: one has another size than the listing had.
        """
        wanted = {part.name: part for entry in self._all() for part in entry.parts.values() if isinstance(part, File)}
        if not any(files.is_remote(name) for name in wanted):
            return
        self._fetched = tempfile.TemporaryFile(prefix="gemsmith-")  # noqa: SIM115
        for file, content in zip(wanted.values(), files.together(files.read, list(wanted)), strict=True):
            if len(content) != file.size:
                raise UserError(f"--pool: {file.name} has changed since it was listed; curate into a new --out")
            self._places[file.name] = self._fetched.tell()
            self._fetched.write(content)
