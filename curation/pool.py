"""The raw pool: which shards there are, and what one sample of a shard says about itself.

A pool is one folder or several of img2dataset tars. All shards are put in one
order, by path, so that the order in which pools are named changes nothing. A
shard is known by its path, size and modification time: what was measured of it
stays valid until one of them changes. Whatever is wrong with a sample becomes a
reason in its row, here and in `curation.images`; nothing raises.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.captions import scored_caption
from curation.errors import UserError
from curation.hashing import config_hash
from curation.tar import IMAGE_EXTENSIONS, Bytes, Member, Sample

MAX_EXTENSION = 24  # so that "{uid}-{copy}.{extension}" fits a tar header's 100 bytes
SAFE_UID = re.compile(r"[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a pool; `index` is its place among all shards of the run."""

    path: str
    fingerprint: str
    size: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the members other than the pixels say; `record` is the json, `error` the first thing wrong, or None."""

    uid: str
    caption: str | None
    url: str | None
    image: Member | None
    record: Mapping[str, Any]
    error: str | None


def list_shards(pools: Sequence[str]) -> list[Shard]:
    """All tars at the top of these folders, by path.

    Raises:
        UserError: no pool is named, one does not exist, or holds no tar.
    """
    if not pools:
        raise UserError("--pool: none given; name at least one folder of img2dataset tars")
    paths: set[Path] = set()
    for pool in pools:
        if "://" in pool:
            raise UserError(f"--pool {pool}: only local folders are read; copy or mount the pool first")
        folder = Path(pool).resolve()
        if not folder.is_dir():
            raise UserError(f"--pool {pool}: no such folder; name a folder of img2dataset tars")
        found = sorted(folder.glob("*.tar"))
        if not found:
            raise UserError(f"--pool {pool}: holds no .tar; name the folder whose top holds the shards")
        paths.update(found)
    shards = []
    for index, path in enumerate(sorted(paths)):
        size = path.stat().st_size
        shards.append(Shard(path=str(path), fingerprint=fingerprint(path), size=size, index=index))
    return shards


def fingerprint(path: Path) -> str:
    """16 hex digits that change when the file at this path does."""
    stat = path.stat()
    return config_hash([str(path), stat.st_size, stat.st_mtime_ns])


def read_row(data: Bytes, sample: Sample) -> Row:
    """Read json and text of a sample and find its image.

    The caption is the txt member, else the json's `caption`; the uid is the
    json's where it can be a file name, else md5 of image bytes + caption.
    """
    members = sample.members
    error = sample.error
    if any(len(e.encode()) > MAX_EXTENSION for e in members):
        error = error or "unsafe_name"
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None:
        error = error or "image_missing"

    meta: dict[str, Any] = {}
    if "json" in members:
        try:
            parsed = json.loads(_bytes(data, members["json"]))
            if not isinstance(parsed, dict):
                raise ValueError
            meta = parsed
        except (ValueError, RecursionError):
            error = error or "json_parse"

    text = _bytes(data, members["txt"]) if "txt" in members else None
    caption: str | None = None
    try:
        caption = scored_caption(meta, text)
    except ValueError as reason:
        error = error or str(reason)

    said = meta.get("caption")
    raw = said.encode("utf-8", "surrogatepass") if text is None and isinstance(said, str) else text
    uid = meta.get("uid")
    if not (isinstance(uid, str) and SAFE_UID.fullmatch(uid)):
        digest = hashlib.md5(_bytes(data, image) if image else sample.key.encode("utf-8", "replace"))
        digest.update(raw or b"")
        uid = digest.hexdigest()
    url = meta.get("url")
    return Row(
        uid=uid,
        caption=caption,
        url=url.encode("utf-8", "replace").decode() if isinstance(url, str) else None,
        image=image,
        record=meta,
        error=error,
    )


def damaged_uid(shard: Shard) -> str:
    """The uid of the row that stands for the unreadable rest of a shard."""
    return hashlib.md5(f"{os.path.basename(shard.path)}: unreadable rest".encode()).hexdigest()


def _bytes(data: Bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]
