"""Files by path or URL: what is there, whether it changed, and its bytes, with retries where a network is between.

A name with "://" goes to fsspec, which finds credentials in the environment as
its backends do (s3fs: AWS_*, gcsfs: GOOGLE_APPLICATION_CREDENTIALS); any other
is a local path. A file is known by size and a stamp: its modification time here,
else the first of what the store says that changes with the content (ETag,
generation, ...). What is missing or forbidden is final; everything else is
tried again after 0.5, 1, 2 and 4 seconds.

A remote file is fetched whole, into a temporary file that has no name any more:
whatever becomes of the process, nothing of it stays on the disk. TMPDIR says
where that is; a worker holds one shard there at a time.
"""

import errno
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import IO, Any, TypeVar

from curation.errors import UserError, one_line

OUT_MARK, STORE_MARK = ".identity.json", ".signal_store.json"
"""What lies in a folder that a command of ours fills, and in a signal store: below a pool these are no part of it."""
NOWHERE = 0  # the stamp of a link that leads nowhere
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt, doubled for each after it
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
TOGETHER = 32  # requests that a worker has under way, where files are small
STAMPS = (
    *("ETag", "etag", "generation", "blob_id", "Content-MD5", "checksum"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "Last-Modified", "created"),
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class File:
    """A file as a listing has it; `stamp` changes when its content does."""

    name: str  # absolute path, or URL
    size: int
    stamp: str | int


def is_remote(name: str) -> bool:
    return "://" in name


def full_name(name: str) -> str:
    """The one spelling of a path or URL: absolute and without links, file:// as the path that it means."""
    if name.startswith(("file://", "local://")):
        name = name.partition("://")[2]
    return _address(name)[2] if is_remote(name) else str(Path(name).resolve())


def look(name: str) -> File | None:
    """The file of this name, or None where there is none (or a folder)."""
    if not is_remote(name):
        try:
            found = os.stat(name)
        except OSError:
            return None
        return File(name, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
    fs, path, url = _address(name)
    fs.invalidate_cache()
    try:
        info = retrying(name, lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return _file(url, info) if info["type"] == "file" else None


def checked(file: File) -> File:
    """The file, or, where it cannot be opened on this machine, as a link to nowhere: its stamp tells when it can."""
    return file if is_remote(file.name) or why_closed(file.name) is None else File(file.name, 0, NOWHERE)


def why_closed(name: str) -> str | None:
    """Why a file on this machine cannot be opened; None where it can."""
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError as reason:
        if of_the_machine(reason):
            raise
        return reason.strerror or type(reason).__name__
    return None


def of_the_machine(reason: OSError) -> bool:
    """Whether it would be the same with any other file: of those to come, none could be opened."""
    return reason.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def listed(folder: str, *, deep: bool = False) -> list[File] | None:
    """The files of a folder by name, those of its folders too if `deep`; None where there is no such folder.

    Hidden files (a dot before the name) are left out, and below the folder whatever lies in one with a mark of ours; a
    link to nowhere is a file that cannot be read. Links to folders are followed, each folder once.
    """
    found = _listed_there(folder, deep) if is_remote(folder) else _listed_here(folder, deep)
    return None if found is None else sorted(found, key=lambda file: file.name)


def _listed_here(folder: str, deep: bool) -> list[File] | None:
    if not os.path.isdir(folder):
        return None
    found: list[File] = []
    seen: set[tuple[int, int]] = set()
    waiting = [(0, folder)]  # how many links led there; of several names for a folder, the same one always comes first
    while waiting:
        links, here = heappop(waiting)
        told = os.stat(here)
        if (told.st_dev, told.st_ino) in seen:
            continue
        seen.add((told.st_dev, told.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    is_file, told = entry.is_file(), entry.stat()
                except OSError:
                    found.append(File(entry.path, 0, NOWHERE))
                    continue
                if is_file:
                    found.append(File(entry.path, told.st_size, told.st_mtime_ns))
                elif deep and entry.is_dir() and not _ours(entry.path):
                    heappush(waiting, (links + entry.is_symlink(), entry.path))
    return found


def _ours(folder: str) -> bool:
    return any(os.path.lexists(os.path.join(folder, mark)) for mark in (OUT_MARK, STORE_MARK))


def _listed_there(folder: str, deep: bool) -> list[File] | None:
    fs, path, url = _address(folder)
    fs.invalidate_cache()
    try:
        if deep and _is_http(fs):
            infos = _walked(fs, path)
        elif deep:
            infos = list(retrying(folder, lambda: fs.find(path, detail=True)).values())
        else:
            infos = retrying(folder, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return None
    infos = [info for info in infos if info["type"] == "file" and not _base(info["name"]).startswith(".")]
    names = [fs.unstrip_protocol(info["name"]) for info in infos]
    if any(info["size"] is None for info in infos):  # an HTTP server lists names alone
        return [file for file in together(look, names) if file is not None]
    if names == [url]:
        return None  # a file, which some stores list as if it were a folder
    return [_file(name, info) for name, info in zip(names, infos, strict=True)]


def _walked(fs: Any, path: str) -> list[dict[str, Any]]:
    """All below a page of links, by the links alone; `find` would fetch every file to see whether it is a folder."""
    found, folders = [], [path]
    while folders:
        folder = folders.pop()
        for info in retrying(folder, partial(fs.ls, folder, detail=True)):
            if info["type"] == "directory":
                folders.append(info["name"])
            else:
                found.append(info)
    return found


def read(file: str, start: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file from `start` on: `size` of them, or fewer where it ends before.

    Raises:
        OSError: it cannot be read; a UserError after several attempts at a remote one.
    """
    if not is_remote(file):
        with open(file, "rb") as f:
            f.seek(start)
            return f.read(-1 if size is None else size)
    fs, path, _ = _address(file)
    end = None if size is None else start + size
    found = retrying(file, lambda: fs.cat_file(path, start=start or None, end=end))
    if size is not None and len(found) > size:  # a server that knows no ranges sends all of it
        found = found[start : start + size]
    return found


def opened(file: str) -> IO[bytes]:
    """The file to read from anywhere; of a remote one only the ranges that are asked for are fetched.

    Raises:
        OSError: no such file, or not allowed.
        UserError: it cannot be opened, or later a range of it read, after several attempts.
    """
    if not is_remote(file):
        return open(file, "rb")
    fs, path, _ = _address(file)

    def begin() -> Any:
        there = fs.open(path, "rb")
        if _is_http(fs):
            try:
                there.seek(max(0, (there.size or 0) - 1))
                there.read(1)
                there.seek(0)
            except ValueError:  # a server that knows no ranges
                there.close()
                return None
        return there

    there = retrying(file, begin)
    if there is None:
        return fetched(file)
    from fsspec.spec import AbstractBufferedFile

    if isinstance(there, AbstractBufferedFile):  # what fails leaves its position where it was
        once = there.read
        there.read = lambda length=-1: retrying(file, lambda: once(length))
    return there


def fetched(file: str) -> IO[bytes]:
    """The whole file as a local one: itself, or a temporary copy that goes when it is closed.

    Raises:
        OSError: no such file, or not allowed.
        UserError: it cannot be fetched, after several attempts.
    """
    if not is_remote(file):
        return open(file, "rb")
    fs, path, _ = _address(file)
    copy = tempfile.TemporaryFile(prefix="gemsmith-")  # noqa: SIM115

    def fetch() -> None:
        os.truncate(copy.fileno(), 0)
        size = fs.info(path)["size"]
        fs.get_file(path, f"/dev/fd/{copy.fileno()}")
        if size is not None and os.fstat(copy.fileno()).st_size != size:
            raise OSError(f"{os.fstat(copy.fileno()).st_size} of {size} bytes came")

    try:
        retrying(file, fetch)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy


def together(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """`map` with several calls under way at once, results in order: for many small requests."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        for at in range(0, len(items), TOGETHER):
            yield from pool.map(function, items[at : at + TOGETHER])


def retrying(name: str, action: Callable[[], T]) -> T:
    """What the action gives, tried again while what it raises may pass.

    Raises:
        OSError: there is no such thing, or it is not allowed.
        UserError: it failed as often as is tried, or the disk is full.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FINAL:
            raise
        except Exception as failure:  # of any backend, which derive theirs from nothing common
            if isinstance(failure, OSError) and failure.errno == errno.ENOSPC:
                full = tempfile.gettempdir()
                raise UserError(f"--pool {name}: no space in {full} for a copy; set TMPDIR to where there is") from None
            reason = f"{type(failure).__name__}: {one_line(failure, 200)}"
            status = getattr(failure, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
            if refused or attempt == ATTEMPTS - 1:
                break
            time.sleep(PAUSE * 2**attempt)
    tried = "is refused" if refused else f"cannot be read, {ATTEMPTS} times"
    raise UserError(f"--pool {name}: {tried} ({reason}); check network and credentials, then run the same again")


def _address(url: str) -> tuple[Any, str, str]:
    """(file system, its path, the URL in its one spelling)"""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as reason:
        line = one_line(reason, None)
        raise UserError(f"--pool {url}: {line}; install what reads it, such as s3fs or gcsfs") from None
    return fs, path, fs.unstrip_protocol(path).rstrip("/")


def _is_http(fs: Any) -> bool:
    return "http" in fs.protocol or "https" in fs.protocol


def _base(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _file(url: str, info: dict[str, Any]) -> File:
    stamp = next((f"{key} {_plain(info[key])}" for key in STAMPS if info.get(key)), "")
    return File(url, info["size"] or 0, stamp)


def _plain(stamp: Any) -> str:
    """A time in seconds, because one file system gives it as a date here and as a number there."""
    stamp = stamp.timestamp() if isinstance(stamp, datetime) else stamp
    return f"{stamp:.3f}" if isinstance(stamp, float) else str(stamp)
