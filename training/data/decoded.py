"""Decoded pictures of a source, kept in a sparse file that every rank of a host reads and writes.

    record i = uint8 [S, S, 3] and the CRC-32 of those bytes

A record is written at once and read at once, never mapped: a full disk is then
an error like any other, where a write to a map ends the process by a signal.
The checksum tells what was written from a hole of the file, and from what a
kill or a power cut left half written: such a picture is decoded again.
"""

import os
import zlib
from pathlib import Path

import numpy as np

SUM = 4  # bytes of the checksum; that of zeros is not 0


class Decoded:
    """
    Args:
        file: made where it is not there.
        side: S of the pictures.
    """

    def __init__(self, file: Path, side: int) -> None:
        self.side, self._bytes = side, side * side * 3
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        os.close(self._file)

    def read(self, i: int) -> np.ndarray | None:
        """uint8 [S, S, 3] of position i, or None where it was not written whole."""
        record = bytearray(self._bytes + SUM)
        got = os.preadv(self._file, [record], i * len(record))
        pixels = memoryview(record)[: self._bytes]
        if got < len(record) or zlib.crc32(pixels) != int.from_bytes(record[self._bytes :], "little"):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(self.side, self.side, 3)

    def write(self, i: int, pixels: np.ndarray) -> None:
        """
        Raises:
            OSError: the disk is full.
        """
        data = pixels.tobytes()
        record = data + zlib.crc32(data).to_bytes(SUM, "little")
        done = os.pwrite(self._file, record, i * len(record))
        if done < len(record):  # there was room for a part
            os.pwrite(self._file, record[done:], i * len(record) + done)
