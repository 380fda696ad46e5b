"""Entries of a folder of files or of a list: what each is made of, first by name, then as its files are.

That an entry is there is read off names alone, a row of the list or the files
that share a stem. What its files are (size and stamp) is looked for apart, once
those entries are known that are asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curation import files
from curation.files import File
from curation.sources.rows import CAPTION_COLUMNS, first_of, record_of, record_text
from curation.tar import IMAGE_EXTENSIONS

FILE_COLUMNS = ("file_name", "filename", "image", "image_path", "filepath", "path")
STEM_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One sample before its files are looked for: by extension a file's name, or bytes, in the order of the tape."""

    key: str
    parts: Mapping[str, str | bytes] = field(default_factory=dict)
    error: str | None = None
    gone: str = "image_missing"  # what is wrong with it where one of its files is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample: by extension a file or bytes, in the order of the tape."""

    key: str
    parts: Mapping[str, File | bytes]
    error: str | None


def by_stem(folder: str, listing: Iterable[File]) -> list[str]:
    """The files of each entry, by their paths from the folder with "\\0" between, since a pool has millions of them.

    Pictures, texts and jsons that share a stem are one; each other file that goes with none of them is one too, since
    it may be a picture that this does not know.
    """
    groups: dict[str, dict[str, str]] = {}
    others: list[tuple[str, str]] = []
    for file in listing:
        name = file.name[len(folder) + 1 :]
        key, extension = _split(name)
        if extension in STEM_EXTENSIONS:
            groups.setdefault(key, {})[extension] = name
        else:
            others.append((key, name))
    found = [(key, "\0".join(names.values())) for key, names in groups.items()]
    if groups:  # else it is no such folder, and refused
        found += [(_text(name), name) for key, name in others if key not in groups]
    return [names for _, names in sorted(found)]


def of_names(folder: str, names: str) -> Draft:
    """An entry of `by_stem`."""
    parts: dict[str, str | bytes] = {}
    key = ""
    for name in names.split("\0"):
        key, extension = _split(name)
        if extension not in STEM_EXTENSIONS:
            return Draft(key=_text(name), error="image_unknown_format")
        parts[extension] = f"{folder}/{name}"
    return Draft(key=key, parts=parts, gone="unreadable")


def of_rows(folder: str, first: int, rows: Iterable[dict[str, Any] | str]) -> list[Draft]:
    """Rows of a list from the one of this number on; one that is a reason is an entry with that error."""
    return [
        Draft(key=f"{n:09d}", error=row) if isinstance(row, str) else _of_row(f"{n:09d}", row, folder)
        for n, row in enumerate(rows, first)
    ]


def _of_row(number: str, row: dict[str, Any], folder: str) -> Draft:
    parts: dict[str, str | bytes] = {}
    key, error = number, None
    name, caption = (row.get(first_of(columns, row) or "") for columns in (FILE_COLUMNS, CAPTION_COLUMNS))
    if isinstance(name, str) and name:
        key, extension = _split(name)
        if name.startswith("/") or ".." in name.split("/") or "\0" in name or files.is_remote(name):
            error = "unsafe_name"
        elif extension not in IMAGE_EXTENSIONS:
            error = "image_unknown_format"
        else:
            parts[extension] = f"{folder}/{name.removeprefix('./')}"
    if isinstance(caption, str):
        parts["txt"] = caption.encode("utf-8", "surrogateescape" if _escaped(caption) else "surrogatepass")
    parts["json"] = record_text(record_of(row))
    return Draft(key=key, parts=parts, error=error)


def looked_for(drafts: Sequence[Draft], there: Mapping[str, File]) -> list[Entry]:
    """The entries with their files as they are now: those in `there`, and else as each is looked for."""
    known = {name: there.get(name) for draft in drafts for name in draft.parts.values() if isinstance(name, str)}
    wanted = [name for name, file in known.items() if file is None]
    if wanted:
        looked = files.together(files.look, wanted) if files.is_remote(wanted[0]) else map(files.look, wanted)
        known.update(zip(wanted, looked, strict=True))
    return [_entry(draft, known) for draft in drafts]


def _entry(draft: Draft, known: Mapping[str, File | None]) -> Entry:
    parts: dict[str, File | bytes] = {}
    error = draft.error
    for extension, part in draft.parts.items():
        found = known[part] if isinstance(part, str) else part
        if found is None:
            error = error or draft.gone
        else:
            parts[extension] = found
    return Entry(key=draft.key, parts=parts, error=error)


def _split(name: str) -> tuple[str, str]:
    """What a file is called without its last extension, as text, and the extension."""
    stem, _, extension = name.rpartition(".")
    return _text(stem), extension.lower()


def _text(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _escaped(text: str) -> bool:
    """Whether its only surrogates are the bytes that were no UTF-8 in the file."""
    return all("\udc80" <= c <= "\udcff" for c in text if "\ud800" <= c <= "\udfff")
