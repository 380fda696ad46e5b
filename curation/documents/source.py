"""The raw pool of documents: which units of work there are, and what the documents of one say, with their pictures.

A pool is a folder, here or behind a URL of fsspec's, with any of
    *.tar     samples of {key}.html and pictures {key}.{name}; or {key}.json in MMC4's layout and pictures {key}.{name}
    *.jsonl   documents in MMC4's layout, one a line; pictures are files relative to it
    **/*.html pages as files; pictures are files in the pool, relative to the page or, with a leading /, to the pool
A page may have {key}.json beside it: {"url", "uid", "images": {address as the page has it: name of member or file}}.
Without an entry there, the picture of an address in a tar is the member called like the address's last part.

Hidden files and folders are no part of it. Nothing is fetched from the web: a picture that is not at hand is dropped as
`image_missing`, which is img2dataset's work to mend.
Nor does an address lead out of the pool, by `..` or by a link: links to folders are looked into, so that nothing that
is there goes uncounted, and a page that lies elsewhere by one is `unsafe_path`.

What is measured of pages and lists hangs on the files beside them too, whose names only their content tells. So all
other files of the pool are in their fingerprints: a picture that has come since is looked for again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from curation import files
from curation.documents.html import PageError, Picture, read_page
from curation.documents.pictures import (
    InPool,
    Item,
    Limits,
    Locate,
    Unreadable,
    beside,
    fetched,
    image_item,
    inside,
    string,
    tar_members,
)
from curation.documents.sentences import split_sentences
from curation.documents.words import plain_spaces
from curation.errors import UserError
from curation.hashing import config_hash
from curation.pool import SAFE_UID, UNREADABLE
from curation.sources import file_fingerprint
from curation.tar import Bytes, Member, mapped, samples

PAGE_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class DocumentShard:
    """One unit of work: a tar, a jsonl file, or some pages of a folder. `index` is its place among all of the run."""

    path: str  # of the tar or jsonl file, or of the pool folder
    pages: tuple[str, ...]  # relative to the folder; none for files
    fingerprint: str  # of a jsonl file, and after a dot that of the files beside it
    index: int

    @property
    def folder(self) -> str:
        """In which the file lies, or the pages' pool itself."""
        return self.path if self.pages else self.path.rpartition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Document:
    key: str
    uid: str
    url: str | None = None
    items: Sequence[Item] = field(default_factory=tuple)
    error: str | None = None

    def domain(self, shard: DocumentShard) -> str:
        """The host of its address; without one the folder that it lies in, which in two pools may have one name."""
        try:
            return urlsplit(self.url).netloc.lower() if self.url else f"{shard.folder}/{self.key.rpartition('/')[0]}"
        except ValueError:
            return ""


def list_documents(pools: Sequence[str], unit_documents: int) -> list[DocumentShard]:
    """The units of work of these folders, by path.

    Raises:
        UserError: no such folder, or nothing in it that can be read.
    """
    found: dict[tuple[str, tuple[str, ...]], str] = {}
    for pool in pools:
        folder = files.full_name(pool)
        try:
            listing = files.listed(folder, deep=True)
        except OSError as reason:
            raise UserError(f"--pool {pool}: cannot be read ({reason}); mend it or take it out") from None
        if listing is None:
            raise UserError(f"--pool {pool}: no such folder; name a folder of pages, tars or jsonl files")
        before = len(found)
        there = {file.name.removeprefix(folder).lstrip("/"): file for file in listing}
        beside = _others(listing)
        for name, file in there.items():
            if "/" not in name and name.endswith((".tar", ".jsonl")):
                mark = "" if name.endswith(".tar") else f".{beside}"
                found[f"{folder}/{name}", ()] = file_fingerprint(files.checked(file)) + mark
        pages = [name for name in there if name.lower().endswith(PAGE_SUFFIXES)]
        for first in range(0, len(pages), unit_documents):
            unit = tuple(pages[first : first + unit_documents])
            found[folder, unit] = config_hash([beside, *(file_fingerprint(there[page]) for page in unit)])
        if len(found) == before:
            raise UserError(f"--pool {pool}: holds no .tar, .jsonl or .html; name a folder that does")
    return [
        DocumentShard(path=path, pages=pages, fingerprint=found[path, pages], index=index)
        for index, (path, pages) in enumerate(sorted(found))
    ]


def _others(listing: Sequence[files.File]) -> str:
    """16 hex digits that change when a file does that is neither page, list nor tar."""
    digest = hashlib.blake2b(digest_size=8)
    for file in listing:
        if not file.name.lower().endswith((*PAGE_SUFFIXES, ".tar", ".jsonl")):
            digest.update(f"{file.name}\0{file.size}\0{file.stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_documents(shard: DocumentShard, pool: InPool, limits: Limits) -> Iterator[Document]:
    """All documents of a unit in a fixed order; what is wrong with one is its error."""
    try:
        if shard.pages:
            yield from _pages(shard.path, shard.pages, limits)
        elif shard.path.endswith(".jsonl"):
            yield from _lines(shard.path, limits)
        else:
            yield from _members(shard, mapped(pool.file(shard.path)), limits)
    except Unreadable:  # the tar or the list itself, as it was when it was listed
        if shard.fingerprint.partition(".")[0] != file_fingerprint(files.File(shard.path, 0, files.NOWHERE)):
            raise
        yield Document(key="", uid=_uid({}, f"{Path(shard.path).name}: all".encode()), error=UNREADABLE)


def _pages(root: str, pages: Sequence[str], limits: Limits) -> Iterator[Document]:
    for page in pages:
        key = page.rpartition(".")[0]
        try:
            path = inside(root, root, page)
            file = files.look(path) if path is not None else None
            if path is not None and file is None:
                raise FileNotFoundError
            size = file.size if file is not None else None
            raw = files.read(f"{root}/{page}") if size is not None and size <= limits.html_bytes else b""
            told = files.look(f"{root}/{key}.json")
            meta = files.read(told.name) if told is not None else b"{}"
        except (OSError, RuntimeError):
            yield Document(key=key, uid=_uid({}, key.encode("utf-8", "replace")), error="page_unreadable")
            continue
        if size is None or size > limits.html_bytes:
            reason = "unsafe_path" if size is None else "html_large"
            yield Document(key=key, uid=_uid({}, key.encode("utf-8", "replace")), error=reason)
            continue
        yield _page(key, raw, meta, beside(root, f"{root}/{page}".rpartition("/")[0]), limits)


def _lines(path: str, limits: Limits) -> Iterator[Document]:
    folder, _, name = path.rpartition("/")
    locate = beside(folder, folder)
    with fetched(path) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield _sentence_list(f"{name.removesuffix('.jsonl')}/{number:08d}", line, locate, limits)


def _members(shard: DocumentShard, data: Bytes, limits: Limits) -> Iterator[Document]:
    found, damage = samples(data, strays=True)
    for sample in found:
        members, key = sample.members, sample.key
        page = members.get("html") or members.get("htm")
        error = sample.error
        if error == "not_a_file" and (page is not None or "json" in members):
            error = None  # a picture that is a link is one that is not at hand
        if page is None and "json" not in members:
            error = error or "document_missing"
        elif page is not None and page.size > limits.html_bytes:
            error = error or "html_large"
        if error:
            digest = key.encode("utf-8", "replace") + (_content(data, page) if page and error != "html_large" else b"")
            yield Document(key=key, uid=_uid({}, digest), error=error)
            continue
        meta = _content(data, members["json"]) if "json" in members else b"{}"
        locate = tar_members(shard.path, shard.fingerprint, sample)
        if page is not None:
            yield _page(key, _content(data, page), meta, locate, limits)
        else:
            yield _sentence_list(key, meta, locate, limits)
    if damage is not None:
        yield Document(key="", uid=_uid({}, f"{Path(shard.path).name}: rest".encode()), error="truncated_tar")


def _page(key: str, raw: bytes, meta_raw: bytes, locate: Locate, limits: Limits) -> Document:
    meta = _mapping(meta_raw)
    uid = _uid(meta or {}, raw)
    if meta is None:
        return Document(key=key, uid=uid, error="json_parse")
    try:
        page = read_page(raw, string(meta.get("url")) or None, limits.items)
    except PageError as reason:
        return Document(key=key, uid=uid, error=str(reason))
    pictures = [item for item in page.items if isinstance(item, Picture)]
    places = iter(locate([picture.written for picture in pictures], meta))
    items: list[Item] = []
    for item in page.items:
        if isinstance(item, Picture):
            said = {"alt": item.alt, "width": item.width, "height": item.height}
            items.append(image_item(item.src, next(places), item.written, limits, **said))
        else:
            paragraphs = plain_spaces(item.text).split("\n\n")
            if limits.sentences:
                paragraphs = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
            items += [Item(text=stripped) for paragraph in paragraphs if (stripped := paragraph.strip())]
    return _limited(Document(key=key, uid=uid, url=page.url, items=items), limits)


def _sentence_list(key: str, raw: bytes, locate: Locate, limits: Limits) -> Document:
    """A document in MMC4's layout; a string `text` in place of `text_list` is split here."""
    meta = _mapping(raw)
    uid = _uid(meta or {}, raw)
    if meta is None:
        return Document(key=key, uid=uid, error="json_parse")
    texts, pictures = meta.get("text_list"), meta.get("image_info", [])
    if isinstance(meta.get("text"), str) and texts is None:
        texts = split_sentences(string(meta["text"]))
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)) or not (
        isinstance(pictures, list)
        and all(isinstance(p, dict) and isinstance(p.get("image_name"), str) for p in pictures)
    ):
        return Document(key=key, uid=uid, error="json_layout")
    if not limits.sentences:
        return Document(key=key, uid=uid, error="assign_missing")  # its pictures have no places of their own
    names = [string(picture["image_name"]) for picture in pictures]
    items = [
        image_item(string(picture.get("raw_url")) or name, place, name, limits)
        for picture, name, place in zip(pictures, names, locate(names, {}), strict=True)
    ]
    items += [Item(text=stripped) for text in texts if (stripped := string(text).strip())]
    return _limited(Document(key=key, uid=uid, url=string(meta.get("url")) or None, items=items), limits)


def _limited(document: Document, limits: Limits) -> Document:
    if len(document.items) > limits.items:
        return Document(key=document.key, uid=document.uid, url=document.url, error="too_many_items")
    return document


def _mapping(raw: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _uid(meta: dict[str, Any], raw: bytes) -> str:
    uid = meta.get("uid")
    return uid if isinstance(uid, str) and SAFE_UID.fullmatch(uid) else hashlib.md5(raw).hexdigest()


def _content(data: Bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]
