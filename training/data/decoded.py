"""Decoded pictures of a source, kept in a sparse file that every rank of a host reads and writes.

    record i = height and width (uint32 each), the CRC-32 of these and the pixels, uint8 [h, w, 3], room up to [S, S, 3]

A record is written at once and read at once, never mapped: a full disk is then
an error like any other, where a write to a map ends the process by a signal.
The checksum tells what was written from a hole of the file, from what a kill or
a power cut left half written, and from a file of another layout: such a picture
is decoded again.
"""

import os
import zlib
from pathlib import Path

import numpy as np

HEAD = 12  # bytes before the pixels


class Decoded:
    """
    Args:
        file: made where it is not there.
        side: S, the longest that a picture's sides are.
    """

    def __init__(self, file: Path, side: int) -> None:
        self.side, self._stride = side, HEAD + side * side * 3
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        os.close(self._file)

    def read(self, i: int) -> np.ndarray | None:
        """uint8 [h, w, 3] of position i, or None where it was not written whole."""
        record = bytearray(self._stride)
        got = os.preadv(self._file, [record], i * self._stride)
        height, width, checksum = (int(n) for n in np.frombuffer(record, "<u4", 3))
        end = HEAD + height * width * 3
        if not (0 < height <= self.side and 0 < width <= self.side and end <= got):
            return None
        pixels = memoryview(record)[HEAD:end]
        if zlib.crc32(pixels, zlib.crc32(memoryview(record)[:8])) != checksum:
            return None
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def write(self, i: int, pixels: np.ndarray) -> None:
        """
        Raises:
            OSError: the disk is full.
        """
        shape, data = np.array(pixels.shape[:2], "<u4").tobytes(), pixels.tobytes()
        record = shape + zlib.crc32(data, zlib.crc32(shape)).to_bytes(4, "little") + data
        done = os.pwrite(self._file, record, i * self._stride)
        if done < len(record):  # there was room for a part
            os.pwrite(self._file, record[done:], i * self._stride + done)
