"""A tar as a tape: the file itself, read by calls, which say where a disk fails; a memory map would end the process."""

import os
from functools import cached_property
from typing import ClassVar, Self

from curation import files, tar
from curation.tar import Sample

VERSION = 4  # goes up when the same file gives other samples


class TarSource:
    """A remote tar that is not read `whole` is read by ranges."""

    headers: ClassVar[bool] = True

    def __init__(self, name: str, *, whole: bool) -> None:
        self._file = files.fetched(name) if whole else files.opened(name)
        self._here = whole or not files.is_remote(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def samples(self) -> tuple[list[Sample], str | None]:
        found, damage = tar.samples(self._bytes, strays=True)
        if damage is None:
            return found, None
        return found, f"{'unreadable' if damage.startswith(tar.UNREAD) else 'truncated_tar'}: {damage}"

    def __getitem__(self, place: slice, /) -> bytes:
        if self._here:
            return self._bytes[place]
        self._file.seek(place.start)
        return self._file.read(place.stop - place.start)

    def read_into(self, view: memoryview, start: int) -> None:
        """Into a buffer that is there, as the copying is most of what a build does."""
        done = 0
        while done < len(view):  # one call gives no more than 2 GiB, and of some file systems less
            came = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not came:
                raise OSError(f"the shard ended before byte {start + len(view)}")
            done += came

    @cached_property
    def _bytes(self) -> tar.Bytes:
        return tar.Tape(self._file)
