"""Rows of a table as members of a sample: which columns are picture, caption and json, and the json's text.

Parquet files and lists of captions name the same things differently; the json
member has img2dataset's names, so that whatever reads its shards reads ours.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from curation.tar import IMAGE_EXTENSIONS

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "img", "image_bytes")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
NAMES = {"text": "caption", "TEXT": "caption", "URL": "url", "UID": "uid"}
MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def first_of(wanted: Iterable[str], present: Iterable[str]) -> str | None:
    """The most preferred of these columns that is there."""
    there = set(present)
    return next((column for column in wanted if column in there), None)


def record_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under img2dataset's names; a column that has such a name itself comes first. Nulls, and NaN, which is
    pandas' null and no JSON, are left out."""
    there = {column: value for column, value in row.items() if value is not None and value == value}
    named = {NAMES.get(column, column): value for column, value in there.items()}
    return named | {column: there[column] for column in named if column in there}


def record_text(record: Mapping[str, Any]) -> bytes:
    """The json member: equal rows give equal bytes; what JSON has no form for (dates, decimals) as text."""
    return json.dumps(record, default=str, separators=(", ", ": ")).encode()


def image_extension(start: bytes, name: str | None) -> str:
    """jpg, png, ... by the first 12 bytes; else as the file was called; else jpg."""
    for magic, extension in MAGIC:
        if start.startswith(magic):
            return extension
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    called = (name or "").rpartition(".")[2].lower()
    return called if called in IMAGE_EXTENSIONS else "jpg"
