"""Kept documents into shuffled webdataset shards, planned and finished as the pairs' are (`curation.shards`).

A document's place is the rank of hash(seed, uid); offsets follow from sizes before a
byte is written, so that any worker may write any unit and the bytes come out the
same. Members are `{uid}.json` and `{uid}.{k}.{format}`, pictures as they lay in the
pool. A marker for each finished unit makes a killed build resume with those in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from curation.copying import Outputs
from curation.documents.pictures import InPool, Place
from curation.plan import Input, Plan
from curation.shards import marker
from curation.tar import BLOCK, headers, padded


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Sets a worker up; called with the `Input` of a unit it writes its kept documents: {"documents", "bytes"}.

    Raises:
        UserError: a file of the pool is not the one that was measured.
    """

    folder: Path
    plan: Plan

    def __call__(self) -> Callable[[Input], dict[str, Any]]:
        return self.do

    def do(self, item: Input) -> dict[str, Any]:
        outputs, pool = Outputs(self.folder / "shards", self.plan.sizes), InPool()
        done = written = 0
        try:
            for part in item.parts:
                entries = self.plan.entries(part)  # of every row once
                places = zip(entries["output"].to_pylist(), entries["offset"].to_pylist(), strict=True)
                for batch in pq.ParquetFile(part.path).iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        content = _content(row, pool)
                        outputs.write(*next(places), memoryview(content))
                        written += len(content)
                        done += 1
        finally:
            outputs.close()
            pool.close()
        assert done == item.kept, (item.shard, done, item.kept)
        marker(self.folder, item).touch()
        return {"documents": done, "bytes": written}


def _content(row: dict[str, Any], pool: InPool) -> bytes:
    """A document as it lies in a tar: headers, bytes and padding of its members."""
    names = [f"{row['uid']}.{extension}" for extension in row["extensions"]]
    heads = headers(names, np.array(row["sizes"], np.int64)).tobytes()
    places = zip(row["paths"], row["fingerprints"], row["offsets"], row["inline"], row["sizes"][1:], strict=True)
    payloads = [row["json"]]
    for path, mark, offset, inline, size in places:
        if inline is None:
            inline = pool.read(Place(path=path, fingerprint=mark, offset=offset, size=size))
        payloads.append(inline)
    out = bytearray()
    for i, payload in enumerate(payloads):
        out += heads[i * BLOCK : (i + 1) * BLOCK] + payload + bytes(padded(len(payload)) - len(payload))
    return bytes(out)
