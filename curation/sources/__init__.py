"""Where the bytes of a shard come from: tars, parquet files and folders of files, here or behind a URL.

A shard is a tape of bytes and a sample is a set of members that are ranges on
it. Each kind gives that tape (`Source`); what measures, builds, inspects and
draws the page knows no other. A shard is named by one string, which ledgers and
signals carry, so that its tape can be opened from the name alone:

    /pool/00000.tar   s3://bucket/pool/part-0.parquet   /photos#20000-25000
    /pool/metadata.csv#5000-10000@381220-762551

A new kind is a file beside these and a line in `_of_file`.
"""

from typing import ClassVar, Protocol, Self

from curation import files
from curation.errors import UserError
from curation.hashing import config_hash
from curation.sources import parquet, tar
from curation.sources.folder import FolderSource, forget_names, is_range
from curation.sources.parquet import ParquetSource
from curation.sources.tar import TarSource
from curation.tar import Sample


class Source(Protocol):
    """The tape of one shard."""

    headers: ClassVar[bool]
    """Whether members lie on it as in a tar: a header before each, and padding to whole blocks behind."""

    def samples(self) -> tuple[list[Sample], str | None]:
        """All samples in their order, and what is wrong with the rest of the shard: "reason: detail", or None."""

    def __getitem__(self, place: slice, /) -> bytes:
        """The bytes of a range within one member."""

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on.

        Raises:
            OSError: the tape ends before that.
        """

    def close(self) -> None:
        """Give back what it holds: memory, and the temporary copy of a remote shard."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def file_fingerprint(file: files.File) -> str:
    """16 hex digits that change when the tar or parquet file does."""
    version = tar.VERSION if file.name.endswith(".tar") else parquet.VERSION
    return config_hash([file.name, file.size, file.stamp, version])


def whole_shard(name: str, expected: str) -> Source:
    """The tape of a shard that will be read from end to end; a remote one is fetched once, now.

    Args:
        expected: the fingerprint that the shard had; what stands after a "." in it is not the tape's.

    Raises:
        UserError: the shard has changed or is gone.
    """
    return _same_shard(name, expected, whole=True)


def open_shard(name: str, expected: str | None = None) -> Source:
    """The tape of a shard of which a few ranges will be read, as the page and `inspect` do.

    Args:
        expected: the fingerprint that it had, for which each file of a range is looked at; None: it was listed now.

    Raises:
        UserError: the shard is not what was expected.
    """
    if expected is not None:
        return _same_shard(name, expected, whole=False)
    return FolderSource(name) if is_range(name) else _of_file(name, whole=False)


class _Closed:
    """A shard that could not be opened when the pool was listed, and cannot yet: a link to nowhere, a file that may not
    be read. It has no samples; nothing else is asked of it."""

    headers: ClassVar[bool] = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def close(self) -> None:
        pass

    def samples(self) -> tuple[list[Sample], str | None]:
        return [], f"unreadable: {self._reason}"

    def __getitem__(self, place: slice, /) -> bytes:
        raise OSError(self._reason)

    def read_into(self, view: memoryview, start: int) -> None:
        raise OSError(self._reason)


def _same_shard(name: str, expected: str, *, whole: bool) -> Source:
    wanted = expected.partition(".")[0]
    try:
        if is_range(name):
            folder = FolderSource(name)
            if folder.fingerprint() != wanted:
                forget_names()
                folder = FolderSource(name)
            if folder.fingerprint() == wanted:
                if whole:
                    folder.fetch()
                return folder
        else:
            closed = file_fingerprint(files.File(name, 0, files.NOWHERE)) == wanted
            if closed and (reason := files.why_closed(name)):
                return _Closed(reason)
            file = files.look(name)
            if file is not None and file_fingerprint(file) == wanted:
                return _of_file(name, whole=whole)
    except OSError as reason:
        raise UserError(f"--pool: {name} cannot be read ({reason}); mend it, or curate into a new --out") from None
    raise UserError(
        f"--pool: {name} has changed since it was measured or listed; put it back as it was, or curate into a new --out"
    )


def _of_file(name: str, *, whole: bool) -> Source:
    return TarSource(name, whole=whole) if name.endswith(".tar") else ParquetSource(name, whole=whole)
