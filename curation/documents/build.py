"""Kept documents into shuffled webdataset shards, planned and finished as the pairs' are (`curation.shards`).

A document's place is the rank of hash(seed, uid); offsets follow from sizes before a
byte is written, so that any worker may write any unit and the bytes come out the
same. Members are `{uid}.json` and `{uid}.{k}.{format}`, pictures as they lay in the
pool. A marker for each finished unit makes a killed build resume with those in flight.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.pool import fingerprint
from curation.shards import Copy, _Outputs, marker
from curation.tar import BLOCK, headers, padded


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Sets a worker up; called with the `Copy` of a unit it writes its kept documents: {"documents", "bytes"}.

    Raises:
        UserError: a file of the pool is not the one that was measured.
    """

    folder: Path
    sizes: Sequence[int]  # bytes of each output shard

    def __call__(self) -> Callable[[Copy], dict[str, Any]]:
        return self.do

    def do(self, item: Copy) -> dict[str, Any]:
        outputs, pool = _Outputs(self.folder, self.sizes), _Pool()
        at = written = 0
        try:
            for part in item.parts:
                for batch in pq.ParquetFile(part).iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        content = _content(row, pool)
                        outputs.write(int(item.output[at]), int(item.offset[at]), memoryview(content))
                        written += len(content)
                        at += 1
        finally:
            outputs.close()
            pool.close()
        assert at == len(item.output), (item.shard, at, len(item.output))
        marker(self.folder, item).touch()
        return {"documents": at, "bytes": written}


def _content(row: dict[str, Any], pool: "_Pool") -> bytes:
    """A document as it lies in a tar: headers, bytes and padding of its members."""
    names = [f"{row['uid']}.{extension}" for extension in row["extensions"]]
    heads = headers(names, np.array(row["sizes"], np.int64)).tobytes()
    places = zip(row["paths"], row["fingerprints"], row["offsets"], row["inline"], row["sizes"][1:], strict=True)
    payloads = [row["json"]]
    for path, mark, offset, inline, size in places:
        payloads.append(inline if inline is not None else pool.read(path, mark, offset, size))
    out = bytearray()
    for i, payload in enumerate(payloads):
        out += heads[i * BLOCK : (i + 1) * BLOCK] + payload + bytes(padded(len(payload)) - len(payload))
    return bytes(out)


class _Pool:
    """The file of the pool that was read last, checked once against what was measured."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._descriptor = -1

    def read(self, path: str, mark: str, offset: int, size: int) -> bytes:
        if path != self._path:
            self.close()
            if not os.path.exists(path) or fingerprint(Path(path)) != mark:
                raise UserError(f"--pool: {path} has changed since it was measured; name another --out")
            self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None
