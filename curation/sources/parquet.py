"""A parquet file of pictures and captions (as the Hugging Face hub has them) or of texts alone, as a tape.

Arrow keeps a column of bytes as one buffer and offsets, which is a tape already:
a row group's is its picture column, its caption column and a json made from all
other columns, one after the other. The row group's number is the upper part of
a position, so any range can be read back by decoding its row group alone, and a
reader holds one row group at a time.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import files
from curation.errors import one_line
from curation.sources.rows import CAPTION_COLUMNS, IMAGE_COLUMNS, first_of, image_extension, record_of, record_text
from curation.tar import Member, Sample

VERSION = 2  # goes up when the same file gives other members
GROUP_BITS = 40  # of a position within a row group
VALUELESS = (ValueError, OverflowError, LookupError)  # raised for a year, a time zone or a struct that Python has not
Piece = tuple[int, memoryview]  # where it begins, and its bytes


def image_column(schema: pa.Schema) -> str | None:
    """The column with the pictures' bytes: binary, or a struct with a binary field `bytes`."""
    return first_of(IMAGE_COLUMNS, (field.name for field in schema if _is_image(field.type)))


def caption_column(schema: pa.Schema) -> str | None:
    return first_of(CAPTION_COLUMNS, (field.name for field in schema if _is_text(field.type)))


def read_footer(name: str) -> tuple[pa.Schema, int]:
    """The schema, and how many rows there are; raises OSError or pa.ArrowException where this is no parquet file."""
    with files.opened(name) as f, pq.ParquetFile(f) as parquet:
        return _distinct(parquet.schema_arrow), parquet.metadata.num_rows


class ParquetSource:
    headers: ClassVar[bool] = False

    def __init__(self, name: str, *, whole: bool) -> None:
        self._file = files.fetched(name) if whole else files.opened(name)
        self._group: tuple[int, list[Piece]] = (-1, [])
        self._parquet: pq.ParquetFile | None = None
        self._damage: str | None = None
        try:
            self._parquet = pq.ParquetFile(self._file)
        except (OSError, pa.ArrowException) as reason:
            self._damage = f"parquet_damaged: {one_line(reason, 200)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._group = (-1, [])
        self._file.close()

    def samples(self) -> tuple[list[Sample], str | None]:
        """A row is a sample, called by its number; those of a row group that cannot be read have "parquet_damaged"."""
        found: list[Sample] = []
        for group in range(self._parquet.num_row_groups if self._parquet else 0):
            assert self._parquet is not None
            rows = self._parquet.metadata.row_group(group).num_rows
            names = [f"{len(found) + i:09d}" for i in range(rows)]
            try:
                members = self._read(group)
            except (OSError, pa.ArrowException):
                found += [Sample(name, error="parquet_damaged") for name in names]
                continue
            found += [Sample(name, by_extension) for name, by_extension in zip(names, members, strict=True)]
        return found, self._damage

    def __getitem__(self, place: slice, /) -> bytes:
        return bytes(self._range(place.start, place.stop - place.start))

    def read_into(self, view: memoryview, start: int) -> None:
        view[:] = self._range(start, len(view))

    def _range(self, start: int, size: int) -> memoryview:
        group, at = start >> GROUP_BITS, start & ((1 << GROUP_BITS) - 1)
        if self._group[0] != group:
            self._read(group)
        pieces = self._group[1]
        begin, content = pieces[bisect_right(pieces, at, key=lambda piece: piece[0]) - 1]
        found = content[at - begin : at - begin + size]
        if len(found) != size:
            raise OSError(f"row group {group} ends before byte {at + size}")
        return found

    def _read(self, group: int) -> list[dict[str, Member]]:
        """Read a row group, keep its pieces, and say where the members of each row lie, by extension."""
        assert self._parquet is not None
        schema = _distinct(self._parquet.schema_arrow)
        image, caption = image_column(schema), caption_column(schema)
        others = [f.name for f in schema if f.name != image and not _is_image(f.type) and not _is_bytes(f.type)]
        self._group = (-1, [])  # so that there are never two of them
        read = self._parquet.read_row_group(group, columns=[*others, *([image] if image else [])])
        table = read.select(_places(read.column_names))
        pieces: list[Piece] = []
        end = group << GROUP_BITS

        def lay(content: memoryview) -> int:
            nonlocal end
            start, end = end, end + len(content)
            if len(content):
                pieces.append((start & ((1 << GROUP_BITS) - 1), content))
            return start

        members: list[dict[str, Member]] = [{} for _ in range(table.num_rows)]
        if image is not None:
            for row, (content, names) in _chunks(table[image]):
                base = lay(content.data)
                for i, start, size in content.places():
                    extension = image_extension(bytes(content.data[start : start + 12]), names[i])
                    members[row + i][extension] = Member("", base + start, size)
        if caption is not None:
            for row, (content, _) in _chunks(table[caption]):
                base = lay(content.data)
                for i, start, size in content.places():
                    members[row + i]["txt"] = Member("", base + start, size)
        texts = [record_text(record_of(row)) for row in _plain_rows(table.select(others))]
        base = lay(memoryview(b"".join(texts)))
        for row_members, text in zip(members, texts, strict=True):
            row_members["json"] = Member("", base, len(text))
            base += len(text)
        self._group = (group, pieces)
        return members


class _Bytes:
    """A chunk of a binary column: its values side by side, and where each lies."""

    def __init__(self, chunk: pa.Array) -> None:
        if pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_decode()
        chunk = chunk.cast(pa.large_binary())
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        first, last = (int(ends[0]), int(ends[-1])) if len(ends) else (0, 0)
        self.data = memoryview(data).cast("B")[first:last] if data is not None else memoryview(b"")
        self._ends = ends - first
        self._valid = chunk.is_valid().to_numpy(zero_copy_only=False)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(row, start, size) of every value that is not null"""
        starts, sizes = self._ends[:-1].tolist(), np.diff(self._ends).tolist()
        return ((i, starts[i], sizes[i]) for i in np.flatnonzero(self._valid).tolist())


def _chunks(column: pa.ChunkedArray) -> Iterator[tuple[int, tuple[_Bytes, list[str | None]]]]:
    """For each chunk: its first row, its bytes, and what the values were called as files."""
    row = 0
    for chunk in column.chunks:
        names: list[str | None] = [None] * len(chunk)
        values = chunk
        if pa.types.is_struct(chunk.type):
            values = pc.struct_field(chunk, "bytes")
            if "path" in {field.name for field in chunk.type}:
                names = plain_values(pc.struct_field(chunk, "path"))
        yield row, (_Bytes(values), names)
        row += len(chunk)


def _distinct(schema: pa.Schema) -> pa.Schema:
    """Of columns of one name, which a join may leave, the first."""
    return pa.schema([schema.field(i) for i in _places(schema.names)])


def _places(names: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    return list(first.values())


def _plain_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = {name: plain_values(table[name]) for name in table.column_names}
    return ({name: values[i] for name, values in columns.items()} for i in range(table.num_rows))


def plain_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """As Python values; text that is not UTF-8, which Arrow does not check, with its bad bytes marked; None for what
    Python has no value for, as dates beyond the year 9999."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if not _is_text(column.type):
            return [None] * len(column)
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in raw]
    except VALUELESS:
        return [_plain_value(value) for value in column]


def _plain_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except VALUELESS:
        return None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def plain_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table under img2dataset's names, without its columns of bytes."""
    kept = [i for i in _places(table.column_names) if not _is_image(table.schema.field(i).type)]
    return (record_of(row) for row in _plain_rows(table.select(kept)))
