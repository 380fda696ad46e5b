"""The tar index against archives that lie in what no checksum covers."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from curation.tar import BLOCK, END, TarDamage, header, members, padded, samples
from tests.conftest import ROOT


def entry(name: str, payload: bytes, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """A tar entry with a right checksum, whatever its kind and size field."""
    block = bytearray(header(name, len(payload)))
    block[156:157] = kind
    if size is not None:
        block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + payload.ljust(padded(len(payload)), b"\0")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "records",
    [
        b"0 path=x\n",  # a record that does not move on
        b"garbage that has no length",
        b"-5 path=x\n",
        b"99 path=x\n",  # longer than the payload
        b"9 path=xy",  # no line end where the length says
        b"10 nothing\n",
        b"11 size=abc\n",
        b"10 size=-1\n",
        b"9" * 5000 + b" path=x\n",  # more digits than `int` takes
        b"12 path=fine\n0 a=b\n",
    ],
)
def test_pax_records_that_lie_are_damage(records: bytes) -> None:
    data = entry("a.txt", b"first") + entry("pax", records, b"x") + entry("b.txt", b"second") + END
    walk = members(data)
    assert next(walk).name == "a.txt"
    with pytest.raises(TarDamage, match="PAX header at byte 1024"):
        next(walk)
    found, damage = samples(data)
    assert [s.key for s in found] == ["a"] and damage is not None


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [b"-0000001000", b"+0000000005", b"0o5", b"1_0", b"9"])
def test_sizes_that_are_not_octal_digits_are_damage(size: bytes) -> None:
    data = entry("a.txt", b"first") + entry("b.txt", b"second", size=size) + END
    found, damage = samples(data)
    assert [s.key for s in found] == ["a"] and damage == f"unreadable header at byte {2 * BLOCK}"


@pytest.mark.parametrize(
    ("rest", "sound"),
    [
        (b"", True),
        (bytes(20 * BLOCK), True),
        (bytes((1 << 20) - BLOCK), True),  # a record of a tape
        (entry("b.txt", b"of another archive") + END, False),
        (bytes(20 * BLOCK) + entry("b.txt", b"of another archive") + END, False),
        (bytes(20 * BLOCK) + b"\0\1", False),
        (bytes(4 << 20), False),  # a file of the whole length, of which a part came
    ],
)
def test_what_follows_the_end_of_an_archive(rest: bytes, sound: bool) -> None:
    data = entry("a.txt", b"first") + bytes(BLOCK) + rest
    found, damage = samples(data)
    assert [s.key for s in found] == ["a"]
    expected = f"the archive ends at byte {2 * BLOCK}, and {BLOCK + len(rest)} bytes follow"
    assert damage == (None if sound else expected)


def test_sound_pax_archives_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "pax.tar"
    names = ["é" * 80 + ".txt", "folder/" * 30 + "deep.txt", "plain.txt"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = n + 3, 1.5
            tar.addfile(info, io.BytesIO(b"abcde"[: n + 3]))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.offset, m.size) for m in members(data)] == expected


CUT = """
import os, sys
from curation.sources.tar import TarSource
from curation.tar import open_tape

def read(opened):
    try:
        return len(opened())
    except OSError as reason:
        return str(reason)

pool, tape = sys.argv[1], TarSource(sys.argv[1] + "/0.tar", whole=True)
member = tape.samples()[0][1].members["bin"]
training = open_tape(pool + "/0.tar")
place = slice(member.offset, member.offset + member.size)
os.truncate(pool + "/0.tar", 8192)
print(read(lambda: tape[place]), read(lambda: training[place]))
"""


def test_a_shard_that_is_cut_while_it_is_read_does_not_end_the_process(tmp_path: Path) -> None:
    """By SIGBUS, as it does where it is mapped; a disk that fails does the same."""
    tar = b"".join(entry(f"{n}.bin", bytes(50_000)) for n in range(2)) + END
    (tmp_path / "0.tar").write_bytes(tar)
    done = subprocess.run([sys.executable, "-c", CUT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the file ended at byte") == 2
