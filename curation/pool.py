"""The raw pool: which shards there are, and what one sample of a shard says about itself.

A pool is a folder or one file, here or behind a URL: img2dataset tars, with
parquet beside them; parquet files that hold the pictures; a list of captions;
or pictures and texts by their names. `curation.sources` reads each. All shards
are put in one order, by path and in the order of a list, so that the order in
which pools are named changes nothing. A shard is known by a fingerprint of path, size and modification time
(or what the store says instead): what was measured of it stays valid until one
of them changes. Whatever is wrong with a sample becomes a reason in its row,
here and in `curation.images`; nothing raises.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import pyarrow as pa

from curation import files
from curation.captions import scored_caption
from curation.errors import UserError
from curation.files import File
from curation.hashing import config_hash
from curation.sources import file_fingerprint
from curation.sources.folder import entries_in, folder_shards, pool_order
from curation.sources.lists import is_list
from curation.sources.parquet import caption_column, image_column, read_footer
from curation.tar import IMAGE_EXTENSIONS, Member, Sample

Modality = Literal["pairs", "images", "texts"]
"""What every sample of a pool must have; what a pool of images or texts lacks is no error there."""
UNREADABLE = "unreadable"
TABLES = 2  # goes up when the same tables beside a tar say something else of its samples
MAX_EXTENSION = 24  # so that "{uid}-{copy}.{extension}" fits a tar header's 100 bytes
MAX_MEMBER = 8**11 - 1  # bytes, as many as a ustar header can say: 8 GiB
LIST_NAME = re.compile(r"/(metadata|captions)\.(csv|tsv|jsonl)$")
SAFE_UID = re.compile(r"[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tape of a pool; `index` is its place among all shards of the run.

    `path` is the name by which `curation.sources` opens it. `sidecar` is the parquet file beside a tar, `metadata`
    are parquet files whose rows belong to samples of any tar, by uid; `tables` names their content. Their fingerprints
    follow the tape's own in `fingerprint`, after a dot. `samples` is how many there are, as far as the listing tells
    it: of all but tars, unless something is wrong with them.
    """

    path: str
    fingerprint: str
    size: int
    index: int
    samples: int | None = None
    sidecar: str | None = None
    metadata: tuple[str, ...] = ()
    tables: str = ""

    def __str__(self) -> str:
        return self.path

    @property
    def whole(self) -> bool:
        """Whether it is scanned and measured in one go: opening it costs what reading it does."""
        return files.is_remote(self.path) or self.path.endswith(".parquet")


class Tape(Protocol):
    def __getitem__(self, place: slice, /) -> bytes: ...


class Beside(Protocol):
    def row(self, key: str, uid: object) -> Mapping[str, Any]:
        """What a table beside the shard says of the sample; {} where it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the members other than the pixels say; `record` is the json, `error` the first thing wrong, or None."""

    uid: str
    caption: str | None
    url: str | None
    image: Member | None
    record: Mapping[str, Any]
    error: str | None


def list_shards(pools: Sequence[str], modality: Modality = "pairs") -> list[Shard]:
    """All shards of these folders, files and URLs, by path; those of a list in its order.

    Raises:
        UserError: no pool is named, one does not exist, or holds nothing that this reads.
    """
    if not pools:
        raise UserError("--pool: none given; name at least one folder, file or URL of samples")
    found: dict[str, Shard] = {}
    metadata: dict[str, File] = {}
    for pool in dict.fromkeys(map(files.full_name, pools)):
        try:
            shards, beside = _shards_of(pool, modality)
        except OSError as reason:
            raise UserError(f"--pool {pool}: cannot be read ({reason})") from None
        found.update({shard.path: shard for shard in shards})
        metadata.update({file.name: file for file in beside})
    if not found:
        raise UserError(
            f"--pool {next(iter(metadata))}: has no column of pictures, so it is metadata; "
            "name the tars as well, or set modality: texts"
        )
    return [_with_tables(found[path], index, metadata) for index, path in enumerate(sorted(found, key=pool_order))]


def _shards_of(pool: str, modality: Modality) -> tuple[list[Shard], list[File]]:
    """The shards of one pool, and its tables of metadata."""
    if pool.endswith((".tar", ".parquet")) or is_list(pool):
        file = files.look(pool)
        listing = None if file is None else [file]
    else:
        listing = files.listed(pool)
    if listing is None:
        raise UserError(f"--pool {pool}: no such folder or file; name one that holds samples")
    found = list(files.together(files.checked, [f for f in listing if f.name.endswith((".tar", ".parquet"))]))
    tars = [file for file in found if file.name.endswith(".tar")]
    tables = {file.name: file for file in found if file.name.endswith(".parquet")}
    shards = []
    for tar in tars:
        name = tar.name.removesuffix(".tar") + ".parquet"
        beside = tables.pop(name, None) or (files.look(name) if tar.name == pool else None)
        mark = f".{config_hash([TABLES, file_fingerprint(beside)])}" if beside else ""
        shards.append(_shard(tar, mark, beside.name if beside else None))
    judged = list(files.together(partial(_is_metadata, modality), list(tables)))
    kinds = {is_metadata for is_metadata, _ in judged}
    unread = False not in kinds and (True in kinds or bool(tars))  # what cannot be read is as the others there
    metadata = []
    for table, (is_metadata, rows) in zip(tables.values(), judged, strict=True):
        if unread if is_metadata is None else is_metadata:
            metadata.append(table)
        else:
            shards.append(dataclasses.replace(_shard(table), samples=rows))
    folders = [] if tars or shards or pool in tables else _folders_of(tables)
    if folders or (not tars and not tables):
        metadata = []
        for base in folders or _lists_in(pool, listing, modality) or [pool]:
            shards += [
                Shard(path=path, fingerprint=fingerprint, size=size, index=0, samples=entries_in(path))
                for path, fingerprint, size in folder_shards(base)
            ]
    if not shards and not metadata:
        raise UserError(
            f"--pool {pool}: holds no .tar, .parquet, list of captions (.csv, .tsv, .jsonl) or picture; "
            "name the folder whose top holds the shards"
        )
    return shards, metadata


def _folders_of(tables: Iterable[str]) -> list[str]:
    """Where img2dataset's output format `files` puts pictures on this machine: a folder beside each table, with all
    that the table says of a picture in its json."""
    folders = [table.removesuffix(".parquet") for table in tables if not files.is_remote(table)]
    return [folder for folder in folders if files.listed(folder)]


def _lists_in(pool: str, listing: Sequence[File], modality: Modality) -> list[str]:
    """The lists of captions in a folder.

    Raises:
        UserError: it has none, and no files of samples, but shards lie further below.
    """
    if lists := [f.name for f in listing if is_list(f.name)]:
        return lists
    below = [f.name for f in files.listed(pool, deep=True) or ()]
    if lists := [name for name in below if LIST_NAME.search(name)]:  # as Hugging Face's image folders have them
        return lists
    extensions = {name.rpartition(".")[2].lower() for name in below}
    places = sorted({name.rpartition("/")[0] for name in below if name.endswith((".tar", ".parquet"))})
    if places and extensions.isdisjoint((*IMAGE_EXTENSIONS, *(["txt"] if modality == "texts" else []))):
        found = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
        raise UserError(
            f"--pool {pool}: holds no samples at its top, but shards or tables below, in {found}; name these"
        )
    return []


def _shard(file: File, mark: str = "", sidecar: str | None = None) -> Shard:
    fingerprint = file_fingerprint(file) + mark
    return Shard(path=file.name, fingerprint=fingerprint, size=file.size, index=0, sidecar=sidecar)


def _is_metadata(modality: Modality, name: str) -> tuple[bool | None, int | None]:
    """Whether a parquet file has no samples of its own, and its rows; None for one that cannot be read, which is an
    error row as a shard and stops the run as metadata."""
    try:
        schema, rows = read_footer(name)
    except (OSError, pa.ArrowException):
        return None, None
    if image_column(schema) is not None:
        return False, rows
    return modality != "texts" or caption_column(schema) is None, rows


def _with_tables(shard: Shard, index: int, metadata: Mapping[str, File]) -> Shard:
    """The shard at its place; a tar with the tables of metadata, all of which may have rows for it."""
    if not metadata or not shard.path.endswith(".tar"):
        return dataclasses.replace(shard, index=index)
    tape, _, mark = shard.fingerprint.partition(".")
    tables = sorted(map(file_fingerprint, metadata.values()))
    return dataclasses.replace(
        shard,
        index=index,
        fingerprint=f"{tape}.{config_hash([TABLES, mark, tables])}",
        metadata=tuple(sorted(metadata)),
        tables=config_hash(tables),
    )


def read_row(data: Tape, sample: Sample, modality: Modality = "pairs", beside: Beside | None = None) -> Row:
    """Read json and text of a sample and find its image.

    The caption is the txt member, else the json's `caption`; the uid is the
    json's where it can be a file name, else md5 of image bytes + caption. What
    a table beside the shard says completes the json, which goes before it but where it has null.
    """
    members = sample.members
    error = sample.error
    if any(member.size > MAX_MEMBER for member in members.values()):
        return unreadable_row(Sample(sample.key, error=error or "member_too_large"))
    if any(len(e.encode()) > MAX_EXTENSION for e in members):
        error = error or "unsafe_name"
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None and modality != "texts":
        error = error or "image_missing"

    meta: dict[str, Any] = {}
    if "json" in members:
        found = _parsed(data, members["json"])
        meta, error = found or {}, error or ("json_parse" if found is None else None)
    if beside is not None:
        own = {name: value for name, value in meta.items() if value is not None}
        meta = {**meta, **beside.row(sample.key, meta.get("uid")), **own}

    text = _bytes(data, members["txt"]) if "txt" in members else None
    caption: str | None = None
    try:
        caption = scored_caption(meta, text)
    except ValueError as reason:
        if modality != "images":
            error = error or str(reason)

    said = meta.get("caption")
    raw = said.encode("utf-8", "surrogatepass") if text is None and isinstance(said, str) else text
    uid = meta.get("uid")
    if not (isinstance(uid, str) and SAFE_UID.fullmatch(uid)):
        nothing = b"" if modality == "texts" and raw else sample.key.encode("utf-8", "replace")
        digest = hashlib.md5(_bytes(data, image) if image else nothing)
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


def uid_said(data: Tape, sample: Sample) -> object:
    """What the json of a sample has as its uid; None also of one that cannot be read."""
    member = sample.members.get("json")
    try:
        return None if member is None or member.size > MAX_MEMBER else (_parsed(data, member) or {}).get("uid")
    except OSError:
        return None


def _parsed(data: Tape, member: Member) -> dict[str, Any] | None:
    try:
        parsed = json.loads(_bytes(data, member))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def unreadable_row(sample: Sample) -> Row:
    """The row of a sample whose bytes cannot be had."""
    uid = hashlib.md5(sample.key.encode("utf-8", "replace")).hexdigest()
    return Row(uid=uid, caption=None, url=None, image=None, record={}, error=sample.error or UNREADABLE)


def damaged_uid(shard: Shard) -> str:
    """The uid of the row that stands for the unreadable rest of a shard."""
    return hashlib.md5(f"{shard.path.rpartition('/')[2]}: unreadable rest".encode()).hexdigest()


def _bytes(data: Tape, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]
