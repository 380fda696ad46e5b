"""The pictures of a document: where the bytes of each lie, or why they are not at hand.

A pool may be here or behind a URL; of a remote one, the file that is read is here as
long as no other is (`InPool`), so that a tar is fetched once for all of its pictures.
Addresses in pages are hostile: one that leads out of the pool, by `..`, an absolute
path or a link, is `unsafe_path`, and one that two different pictures of a tar's page
share by its last part is `image_ambiguous` unless the page's json says which is which.
"""

import base64
import binascii
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from curation import files
from curation.errors import UserError, one_line
from curation.sources import file_fingerprint
from curation.tar import Sample


class Unreadable(UserError):
    """A file of the pool is there and cannot be opened."""


class InPool:
    """The file of the pool that was read last, kept open."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._file: IO[bytes] | None = None

    def file(self, path: str, mark: str | None = None) -> IO[bytes]:
        """A local file, which is open until another is asked for. `mark`: the fingerprint that it had.

        Raises:
            UserError: it is not the one that was measured, or cannot be fetched.
        """
        if path != self._path or self._file is None:
            self.close()
            if mark is not None:
                found = files.look(path)
                if found is None or file_fingerprint(found) != mark:
                    raise UserError(f"--pool: {path} has changed since it was measured; name another --out")
            self._path, self._file = path, fetched(path)
        return self._file

    def read(self, place: "Place") -> bytes:
        return os.pread(self.file(place.path, place.fingerprint).fileno(), place.size, place.offset)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._path = self._file = None


def fetched(path: str) -> IO[bytes]:
    """A tar or list of the pool as a local file.

    Raises:
        Unreadable: it cannot be opened.
        UserError: it cannot be fetched.
        OSError: no file can be opened here now.
    """
    try:
        return files.fetched(path)
    except OSError as reason:
        if files.of_the_machine(reason):
            raise
        raise Unreadable(f"--pool: {path} cannot be read ({one_line(reason)}); mend it or take it out") from None


def inside(root: str, folder: str, name: str) -> str | None:
    """The path or URL of a file of the pool `root` by its name as seen from a folder of it, from the pool's top if it
    begins with a /; None where it leads out of the pool, by `..` or, on this machine, by a link.

    Raises:
        OSError, ValueError, RuntimeError: no file can be called so, or links lead in a circle. A URL may mean more
            than a file's name: another file system (::), a query, dots and slashes that a server decodes.
    """
    top = root if name.startswith("/") else folder
    if not files.is_remote(root):
        path = (Path(top) / name.lstrip("/")).resolve()
        return str(path) if path.is_relative_to(root) else None
    found = posixpath.normpath(posixpath.join(top.removeprefix(root).lstrip("/"), name.lstrip("/")))
    if not found.isprintable() or len(found.encode()) > NAME_BYTES or any(sign in found.lower() for sign in NO_NAMES):
        raise OSError(f"{found[:100]!r} is no name")
    return None if found.partition("/")[0] in ("..", ".") else f"{root}/{found}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a picture's bytes lie."""

    path: str
    fingerprint: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """A text, or a picture (`text` is None) with its place, or its bytes where the page holds them, or its error."""

    text: str | None = None
    src: str = ""
    alt: str = ""
    width: str = ""
    height: str = ""
    place: Place | None = None
    inline: bytes | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is read of a document; `sentences` says that texts are split into them."""

    html_bytes: int
    image_bytes: int
    items: int
    sentences: bool


NAME_BYTES = 900  # of a file behind a URL, seen from its pool; object stores take some 1,000 in all
NO_NAMES = ("::", "?", "#", "%2e", "%2f", "%5c")
NO_PICTURES = ("html", "htm", "json")
Locate = Callable[[Sequence[str], dict[str, Any]], list[Place | str]]
"""For addresses as the document has them, and its meta data, gives places or the reasons why there are none."""


def image_item(
    src: str, place: Place | str, written: str, limits: Limits, *, alt: str = "", width: str = "", height: str = ""
) -> Item:
    """A picture by its address: with its place, or with the bytes that the address itself holds (data:)."""
    error, inline = None, None
    if written.startswith("data:"):
        src, _, payload = written.partition(",")
        inline = _inline(src, payload)
        error = "image_data" if inline is None else None
        src = src[:100]
    elif isinstance(place, str):
        error = place
    size = place.size if isinstance(place, Place) else len(inline or b"")
    if size > limits.image_bytes:
        error, inline = "image_bytes", None
    found = place if isinstance(place, Place) and error is None else None
    return Item(src=src, alt=alt, width=width, height=height, place=found, inline=inline, error=error)


def _inline(head: str, payload: str) -> bytes | None:
    raw = unquote_to_bytes(payload)
    if not head.lower().endswith(";base64"):
        return raw
    digits = b"".join(raw.split())
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)  # browsers ask for no padding
    except (binascii.Error, ValueError):
        return None


def beside(root: str, folder: str) -> Locate:
    """Pictures that are files: a relative address from `folder` on, one with a leading / from `root` on."""

    def locate_one(written: str, listed: object) -> Place | str:
        if written.startswith("data:"):
            return ""
        if not written:
            return "image_no_address"
        mapped = listed.get(written) if isinstance(listed, dict) else None
        try:
            parts = urlsplit(written)
            if not isinstance(mapped, str) and (parts.scheme or parts.netloc):
                return "image_missing"
            name = mapped if isinstance(mapped, str) else unquote(parts.path)
            path = inside(root, folder, name)
            if path is None:
                return "unsafe_path"
            file = files.look(path)
            if file is None:
                return "image_missing"
            return Place(path=path, fingerprint=file_fingerprint(file), offset=0, size=file.size)
        except UserError:  # of a network
            raise
        except (OSError, ValueError, RuntimeError):  # names that no file can have, links in a circle
            return "image_missing"

    return lambda addresses, meta: [locate_one(written, meta.get("images")) for written in addresses]


def tar_members(path: str, mark: str, sample: Sample) -> Locate:
    """Pictures that are members of the document's sample."""

    def locate(addresses: Sequence[str], meta: dict[str, Any]) -> list[Place | str]:
        listed = meta.get("images")
        mapping = listed if isinstance(listed, dict) else {}
        users: dict[str, set[str]] = {}
        for written in addresses:
            users.setdefault(_last_part(written), set()).add(written.partition("?")[0].partition("#")[0])
        found: list[Place | str] = []
        for written in addresses:
            mapped = mapping.get(written)
            name = mapped.rpartition("/")[2] if isinstance(mapped, str) else _last_part(written)
            extensions = (name.lower(), name.removeprefix(f"{sample.key.rpartition('/')[2]}.").lower())
            found_as = next((e for e in extensions if e in sample.members and e not in NO_PICTURES), None)
            if written.startswith("data:"):
                found.append("")
            elif not name:
                found.append("image_no_address")
            elif found_as is None:
                found.append("image_missing")
            elif not isinstance(mapped, str) and len(users[name]) > 1:
                found.append("image_ambiguous")
            else:
                member = sample.members[found_as]
                found.append(Place(path=path, fingerprint=mark, offset=member.offset, size=member.size))
        return found

    return locate


def _last_part(address: str) -> str:
    """The file name that an address ends with; "" for inline pictures."""
    try:
        return "" if address.startswith("data:") else unquote(urlsplit(address).path).rpartition("/")[2]
    except ValueError:
        return ""


def string(value: object) -> str:
    """A string that UTF-8 can hold; "" for anything else."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
