"""The two ends of the build's copy loop: kept samples off an input shard, and into output files at planned places.

Here is nearly all of the build's time, and nearly all of that is the kernel's:
so what lies side by side in the shard comes by one read, and a sample goes out
by one write. Output files are reserved whole before their first write, which a
file system fills a third faster than a hole, and which says that a disk is too
small before hours of copying do.
"""

import ctypes
import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from curation.sources import Source
from curation.tar import BLOCK

BUFFER = 1 << 20  # bytes; one that stays in the processor's cache
OPEN_FILES = 256  # output files that one worker holds open
IN_USE = np.where(np.arange(BLOCK) < np.arange(BLOCK + 1)[:, None], 0xFF, 0).astype(np.uint8).view(np.uint64)
"""Masks that leave the first 0 to BLOCK bytes of a block: uint64 [BLOCK + 1, BLOCK / 8]"""


def lay_out(
    tape: Source, heads: np.ndarray, starts: np.ndarray, sizes: np.ndarray, lengths: np.ndarray, texts: Sequence[bytes]
) -> Iterator[memoryview]:
    """Samples as they lie in a tar, one after another: headers, bytes and padding of their members.

    Members that are a header apart on a tape that has headers are read by one call, old header and all. Our headers go
    over those, and zeros over what pads a member's last block. Writing from a memory map of the shard would need no
    buffer, but costs a page fault every few kilobytes.

    Args:
        heads: of each member, uint8 [M, 512].
        starts: where a member's bytes are, int64 [M]: on the tape, or -1 - their place in `texts`.
        sizes: bytes of each member, int64 [M].
        lengths: members of each sample, int64 [N]; they are M in all.

    Yields:
        A view of one sample, valid until the next.
    """
    # Places are in blocks, counted through all the samples in a row.
    taken = -(-sizes // BLOCK)
    last = np.cumsum(1 + taken) - 1  # where a member ends
    first = last - taken  # its header
    members = np.concatenate([[0], np.cumsum(lengths)])  # those of sample i are members[i] : members[i + 1]
    bounds = np.concatenate([[0], last + 1])[members]  # where sample i begins
    apart = np.ones(len(starts), bool)  # what is not a header behind the member before it
    if tape.headers:  # else what lies between two members that are so far apart is something else's bytes
        apart[1:] = (starts[1:] != starts[:-1] + (1 + taken[:-1]) * BLOCK) | (starts[:-1] < 0)
    in_use = IN_USE[(sizes - 1) % BLOCK + 1]  # of the block where a member ends
    heads = heads.view(np.uint64)

    blocks = np.empty((BUFFER // BLOCK, BLOCK), np.uint8)
    begin = 0
    while begin < len(lengths):  # as many samples as fit into the buffer, or a large one
        end = max(begin + 1, int(np.searchsorted(bounds, bounds[begin] + len(blocks), "right")) - 1)
        if bounds[end] - bounds[begin] > len(blocks):
            blocks = np.empty((bounds[end] - bounds[begin], BLOCK), np.uint8)
        content, base, these = memoryview(blocks.data).cast("B"), bounds[begin], slice(members[begin], members[end])
        runs = np.flatnonzero(np.append(True, apart[these][1:])) + members[begin]
        for head, tail in zip(runs.tolist(), [*(runs[1:] - 1).tolist(), members[end] - 1], strict=True):
            start, size = int(starts[head]), int(starts[tail] + sizes[tail] - starts[head])
            at = int(first[head] - base + 1) * BLOCK
            if start < 0:
                content[at : at + size] = texts[-1 - start]
            else:
                tape.read_into(content[at : at + size], start)
        words = blocks.view(np.uint64)
        words[last[these] - base] &= in_use[these]
        words[first[these] - base] = heads[these]
        cuts = ((bounds[begin : end + 1] - base) * BLOCK).tolist()
        for left, right in itertools.pairwise(cuts):
            yield content[left:right]
        begin = end


class Outputs:
    """Open output files, the last used ones, each given its planned size when first opened."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._open: OrderedDict[int, int] = OrderedDict()

    def write(self, output: int, offset: int, content: memoryview) -> None:
        descriptor = self._open.get(output)
        if descriptor is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(self._folder / tar_name(output), os.O_WRONLY | os.O_CREAT, 0o644)
            if os.fstat(descriptor).st_size != self._sizes[output]:
                _reserve(descriptor, self._sizes[output])
            self._open[output] = descriptor
        self._open.move_to_end(output)
        written = 0
        while written < len(content):  # a signal or a full disk may cut it short; the next call then raises
            written += os.pwrite(descriptor, content[written:], offset + written)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def tar_name(output: int) -> str:
    return f"{output:08d}.tar"


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its room on disk where the file system can do that.

    The system's own call: where it fails, `os.posix_fallocate` would write into every block itself, and over what
    another worker has just written there.

    Raises:
        OSError: the disk is too small.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate64") or libc.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(descriptor, size)
