"""Remote shards on the local disk: fetched whole, written atomically, the least recently used dropped first.

All ranks of a host, and other runs, may share one folder: a lock for each shard
lets one process fetch it while the others wait. A cached file is named by its
address, size and stamp, so a shard that changed is another file. A dropped file
that somebody has mapped stays readable until it is closed, as POSIX has it.
"""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from curation import files, tar
from curation.errors import UserError
from curation.hashing import config_hash

LOCKS = 64  # lock files, which shards share by hash, so that they need not be removed
ABANDONED = 24 * 3600.0  # seconds after which the remains of a killed fetch are dropped


class ShardCache:
    """Remote tars as local memory maps, in `folder`, of `limit` bytes at most."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, file: files.File) -> tar.Bytes:
        """The bytes of a remote file, fetched first where they are not here.

        Raises:
            FileNotFoundError: the store has it no longer.
            UserError: it cannot be fetched, after several attempts, or there is no space for it.
        """
        target = self.folder / f"{config_hash([file.name, file.size, file.stamp])}-{file.name.rpartition('/')[2]}"
        with self._held(target.name):
            with contextlib.suppress(FileNotFoundError):
                os.utime(target)  # what was used last is dropped last
                return tar.open_shard(target)
            self._make_room(file)
            temporary = self.folder / f".{uuid.uuid4().hex}.part"
            try:
                _fetch(file, temporary)
                data = tar.open_shard(temporary)  # before anybody may drop it
                temporary.rename(target)
            finally:
                temporary.unlink(missing_ok=True)
            return data

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[None]:
        with open(self.folder / f".lock-{int(name[:16], 16) % LOCKS:02d}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, file: files.File) -> None:
        """Drop the least recently used until the file fits into the limit."""
        found, used = [], 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # dropped by another rank meanwhile
                stat = entry.stat()
                if entry.name.endswith(".part") and time.time() - stat.st_mtime > ABANDONED:
                    os.unlink(entry.path)
                elif not entry.name.startswith("."):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
                    used += stat.st_size
        for _, size, path in sorted(found):
            if used + file.size <= self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        if shutil.disk_usage(self.folder).free < file.size:
            raise UserError(
                f"loader.cache_dir {self.folder}: no space for {file.name} ({file.size / 2**30:.2f} GiB); "
                "free some or name another folder"
            )


def _fetch(file: files.File, target: Path) -> None:
    """Download with the retries of `curation.files`."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(file.name)

    def once() -> None:
        fs.get_file(path, str(target))
        if (size := target.stat().st_size) != file.size:
            raise OSError(f"{size} of {file.size} bytes came")

    try:
        files.retrying(file.name, once)
    except UserError as error:
        raise UserError(str(error).replace("--pool", "--data", 1)) from None
