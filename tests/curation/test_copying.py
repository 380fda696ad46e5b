"""The copy loop's ends: tars laid out from a damaged-looking tape, against the plain way; files reserved or refused."""

import errno
import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import copying
from curation.config import parse_config
from curation.copying import Outputs, lay_out
from curation.errors import UserError
from curation.pipeline import curate
from curation.sources import open_shard
from curation.sources.tar import TarSource
from curation.tar import BLOCK, headers, padded
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_kill import in_this_process

RNG = np.random.default_rng(0)


def plainly(samples: list[list[tuple[str, bytes]]]) -> list[bytes]:
    """The same by tarfile, sample by sample."""
    found = []
    for members in samples:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            found.append(buffer.getvalue()[: tar.offset])
    return found


@pytest.mark.parametrize("buffer", [BLOCK, 16 * BLOCK, 1 << 20])
@pytest.mark.parametrize("chosen", [range(60), range(0, 60, 3), [5, 5, 4, 59, 0, 1, 2]])
def test_as_tarfile_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, chosen: list[int] | range
) -> None:
    """Dense and sparse choices, repeats, empty and whole-block members, padding that is not zero, texts from memory."""
    monkeypatch.setattr(copying, "BUFFER", buffer)
    sizes = [int(n) for n in RNG.choice([0, 1, 511, 512, 513, 1024, 5000, 20_000], 120)]
    contents = [RNG.bytes(n) for n in sizes]
    tape, offsets = bytearray(), []
    for content in contents:  # two members a sample, with junk where headers and padding are
        tape += b"h" * BLOCK
        offsets.append(len(tape))
        tape += content + b"p" * (padded(len(content)) - len(content))
    (tmp_path / "tape").write_bytes(tape)

    samples, starts, texts = [], [], []
    for n, i in enumerate(chosen):
        samples.append([(f"{i}-{n}.a", contents[2 * i]), (f"{i}-{n}.b", contents[2 * i + 1])])
        starts += offsets[2 * i : 2 * i + 2]
        if n % 4 == 0:
            starts.append(-1 - len(texts))
            texts.append(f"text {n}".encode() * n)
            samples[-1].append((f"{i}-{n}.new", texts[-1]))
    members = [member for sample in samples for member in sample]
    lengths = np.array([len(content) for _, content in members])
    heads = headers([name for name, _ in members], lengths)
    with TarSource(str(tmp_path / "tape"), whole=True) as opened:
        found = [
            bytes(sample)
            for sample in lay_out(opened, heads, np.array(starts), lengths, np.array([len(s) for s in samples]), texts)
        ]
    assert found == plainly(samples)


def test_outputs_are_whole_and_hold_no_more_files_open_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "OPEN_FILES", 2)
    outputs = Outputs(tmp_path, [10, 20, 30, 40])
    before = len(os.listdir("/proc/self/fd"))
    for output, offset in [(3, 5), (0, 0), (1, 2), (3, 30), (2, 29), (0, 8)]:
        outputs.write(output, offset, memoryview(b"x"))
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    outputs.close()
    assert [p.stat().st_size for p in sorted(tmp_path.iterdir())] == [10, 20, 30, 40]
    assert [p.read_bytes().count(b"x") for p in sorted(tmp_path.iterdir())] == [2, 1, 1, 2]


def test_a_disk_that_is_too_small_is_known_at_the_first_write(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, [1 << 50])
    with pytest.raises(OSError, match=r"No space left|File too large"):
        outputs.write(0, 0, memoryview(b"x"))


@pytest.mark.parametrize("modality", ["pairs", "texts"])
def test_every_row_of_row_groups_of_any_size_is_built_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: str
) -> None:
    """On a parquet file's tape, members of a row may lie a header and padding apart, and other rows' between them."""
    in_this_process(monkeypatch)
    draw = np.random.default_rng(0)
    groups = [[64] * 16, [128] * 8, [256] * 4, [512] * 2]  # of 1,024 bytes: the first row's json begins 1,024 after txt
    groups += [draw.integers(1, 200, n).tolist() for n in draw.integers(1, 24, 60)]
    expected: dict[str, bytes] = {}
    path, writer = tmp_path / "rows.parquet", None
    for lengths in groups:
        rows = []
        for length in lengths:
            uid, caption = f"{len(expected):032x}", ("a cat " * 99)[:length].replace(" ", "_")
            row: dict[str, object] = {"uid": uid, "caption": caption}
            expected |= {f"{uid}-0.txt": caption.encode(), f"{uid}-0.json": json.dumps(row).encode()}
            if modality == "pairs":
                row["image"] = expected[f"{uid}-0.png"] = picture(len(expected), (length % 5 + 1, 2), "PNG")
            rows.append(row)
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=len(rows))
    assert writer is not None
    writer.close()
    with open_shard(str(path)) as tape:
        members = [list(sample.members.values()) for sample in tape.samples()[0]]
    pairs = [pair for ranges in members for pair in itertools.pairwise(ranges)]
    assert sum(b.offset - a.offset == BLOCK + padded(a.size) for a, b in pairs) >= 4, "no row is a case of it"

    out = tmp_path / "out"
    curate(parse_config({"modality": modality, "unit_samples": 200}), pools=[str(path)], out=out)
    found: dict[str, bytes] = {}
    for shard in (out / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert found == expected


def test_a_range_that_comes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB by one call, and a file system of the user's what it likes."""
    content, preadv = RNG.bytes(5000), os.preadv
    (tmp_path / "tape").write_bytes(content)
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:700]], at))
    with TarSource(str(tmp_path / "tape"), whole=True) as tape:
        for start, size in ((0, 0), (0, 700), (13, 4987)):
            found = bytearray(size)
            tape.read_into(memoryview(found), start)
            assert found == content[start : start + size]
        with pytest.raises(OSError, match="the shard ended before byte 5001"):
            tape.read_into(memoryview(bytearray(4000)), 1001)


def test_a_disk_that_fails_in_the_midst_of_a_shard_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    shard, out, preadv = write_tar(tmp_path / "pool" / "0.tar", {"0": sample(0)}), tmp_path / "out", os.preadv

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    config = parse_config({"signals": {"text": {"kind": "text"}}})
    with pytest.raises(UserError, match=rf"^--pool: {shard} cannot be copied, .* \(Input/output error\); mend it"):
        curate(config, pools=[str(shard.parent)], out=out)
    monkeypatch.setattr(os, "preadv", preadv)
    assert curate(config, pools=[str(shard.parent)], out=out)["kept"] == 1


def test_what_lies_side_by_side_in_a_tar_comes_by_one_read(tmp_path: Path) -> None:
    (tmp_path / "tape").write_bytes(bytes(4 * BLOCK))
    asked: list[tuple[int, int]] = []

    class Asked(TarSource):
        def read_into(self, view: memoryview, start: int) -> None:
            asked.append((start, len(view)))
            super().read_into(view, start)

    heads = headers(["a.jpg", "b.jpg"], np.array([100, 100]))
    starts, sizes, one = np.array([0, 2 * BLOCK]), np.array([100, 100]), np.array([1, 1])
    with Asked(str(tmp_path / "tape"), whole=True) as tape:
        assert len(list(lay_out(tape, heads, starts, sizes, one, ()))) == 2
    assert asked == [(0, 2 * BLOCK + 100)]
