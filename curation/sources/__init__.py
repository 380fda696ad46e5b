"""Where the bytes of a shard come from: tars, parquet files and folders of files, here or behind a URL.

A shard is a tape of bytes and a sample is a set of members that are ranges on
it. Each kind gives that tape (`Source`); what measures, builds, inspects and
draws the page knows no other. A shard is named by one string, which ledgers and
signals carry, so that its tape can be opened from the name alone:

    /pool/00000.tar   s3://bucket/pool/part-0.parquet   /pool/metadata.csv#0-10000   /photos#20000-30000

A new kind is a file beside these and a line in `_opened`.
"""

from typing import Protocol, Self

from curation import files
from curation.errors import UserError
from curation.hashing import config_hash
from curation.sources.folder import FolderSource, folder_fingerprint, is_range
from curation.sources.parquet import VERSION, ParquetSource
from curation.sources.tar import TarSource
from curation.tar import Sample


class Source(Protocol):
    """The tape of one shard."""

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


def fingerprint(name: str) -> str | None:
    """16 hex digits that change when the shard of this name does; None where it is gone."""
    if is_range(name):
        return folder_fingerprint(name)
    file = files.look(name)
    return None if file is None else file_fingerprint(file)


def file_fingerprint(file: files.File) -> str:
    """`fingerprint`, of a tar or parquet file as a listing has it."""
    known = [file.name, file.size, file.stamp]
    return config_hash(known if file.name.endswith(".tar") else [*known, VERSION])


def whole_shard(name: str, expected: str) -> Source:
    """The tape of a shard that will be read from end to end; a remote one is fetched once, now.

    Args:
        expected: the fingerprint that the shard had; what stands after a "." in it is not the tape's.

    Raises:
        UserError: the shard has changed or is gone.
    """
    try:
        if fingerprint(name) == expected.partition(".")[0]:
            return _opened(name, whole=True)
    except OSError as reason:
        raise UserError(f"--pool: {name} cannot be read ({reason}); mend it, or curate into a new --out") from None
    raise UserError(f"--pool: {name} has changed since it was measured or listed; curate into a new --out")


def open_shard(name: str) -> Source:
    """The tape of a shard of which a few ranges will be read, as the page and `inspect` do."""
    return _opened(name, whole=False)


def _opened(name: str, *, whole: bool) -> Source:
    if is_range(name):
        return FolderSource(name, whole=whole)
    if name.endswith(".tar"):
        return TarSource(name, whole=whole)
    return ParquetSource(name, whole=whole)
