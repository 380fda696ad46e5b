"""The build: kept samples into shuffled webdataset shards, by copying raw member bytes to offsets planned in advance.

Where each goes is known before anything is copied (`curation.plan`). So every
input shard is streamed once by whichever worker takes it, every sample is one
`pwrite` into a preallocated output file, and the bytes are the same for any
number of workers and any order. A marker for each finished input shard makes a
killed build resume with those in flight; the shards appear by one rename.

Nothing is decoded or encoded; image, text, json and any other member are copied
as they are, under the key `{uid}-{j}` (j counts equal uids), as DataComp's
resharder names them. Markers hold against a killed process, not against a power
cut: files are not synced one by one.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.copying import Outputs, lay_out, tar_name
from curation.errors import UserError
from curation.manifest import SCHEMA_VERSION
from curation.plan import Input, Plan
from curation.selection.engine import Partition, partitions
from curation.sources import Source, whole_shard
from curation.tar import headers

STRETCH = 8_192  # rows whose headers, 1.5 KB each, are made at once


class Copying:
    """Copies one input shard. A worker calls it with a `Input`; it leaves a marker when all bytes are written."""

    def __init__(self, folder: Path, made: Plan) -> None:
        self._folder, self._plan = folder, made

    def __call__(self) -> Callable[[Input], dict[str, Any]]:
        return self.do

    def do(self, item: Input) -> dict[str, Any]:
        """Copy the kept samples of one input shard: {"samples", "bytes"}.

        Raises:
            UserError: the shard is not the one that was measured, or a disk fails in the midst of it.
        """
        outputs = Outputs(self._folder / "shards", self._plan.sizes)
        done = written = 0
        try:
            with whole_shard(item.shard, item.fingerprint) as tape:
                for stretch in partitions(item.parts, STRETCH):
                    entries = self._plan.entries(stretch)
                    places = zip(entries["output"].to_pylist(), entries["offset"].to_pylist(), strict=True)
                    for (output, offset), sample in zip(
                        places, _samples(tape, stretch, entries, self._plan.members), strict=True
                    ):
                        outputs.write(output, offset, sample)
                        written += len(sample)
                        done += 1
        except OSError as reason:
            if reason.errno != errno.EIO:
                raise
            raise UserError(
                f"--pool: {item.shard} cannot be copied, its disk or that of --out fails ({reason.strerror}); mend it "
                "and run the same command again, which goes on where this one stopped"
            ) from None
        finally:
            outputs.close()
        assert done == item.kept, (item.shard, done, item.kept)
        marker(self._folder, item).touch()
        return {"samples": done, "bytes": written}


def _samples(tape: Source, stretch: Partition, entries: pa.Table, new: Mapping[str, str]) -> Iterator[memoryview]:
    """Each copy that a stretch of the pool gives, as it lies in a tar; see `lay_out`.

    new: extension -> column whose texts become members, at the end of their sample.
    """
    columns = ["uid", "extensions", "offsets", "sizes", *new.values()]
    table = stretch.read(columns).take(entries["row"]).combine_chunks()
    rows = np.arange(table.num_rows)
    of = [np.repeat(rows, pc.list_value_length(table["sizes"]).to_numpy())]  # the copy that each member belongs to
    extensions = [pc.list_flatten(table["extensions"]).combine_chunks()]
    starts, sizes = ([pc.list_flatten(table[name]).to_numpy()] for name in ("offsets", "sizes"))
    texts: list[bytes] = []
    for extension, column in new.items():
        added = [text.encode() for text in table[column].drop_null().to_pylist()]
        of.append(rows[table[column].is_valid().to_numpy()])
        extensions.append(pa.repeat(extension, len(added)))
        starts.append(-1 - len(texts) - np.arange(len(added)))
        sizes.append(np.array([len(text) for text in added], np.int64))
        texts += added
    members = np.concatenate(of)
    order = np.argsort(members, kind="stable")
    stems = pc.binary_join_element_wise(table["uid"], pc.cast(entries["copy"], pa.string()), "-").combine_chunks()
    named = stems.take(pa.array(members[order])), pa.concat_arrays(extensions).take(pa.array(order))
    size = np.concatenate(sizes)[order]
    heads = headers(pc.binary_join_element_wise(*named, "."), size)
    lengths = np.bincount(members, minlength=len(rows))
    return lay_out(tape, heads, np.concatenate(starts)[order], size, lengths, texts)


def marker(folder: Path, item: Input) -> Path:
    """The file whose presence says that this input shard is copied."""
    return folder / "done" / item.fingerprint


def prepare(folder: Path) -> None:
    for name in ("shards", "done"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def finish(folder: Path, target: Path, made: Plan) -> None:
    """Write the files beside the tars, check the tars' sizes, and let the shards appear as `target` by one rename."""
    shards = folder / "shards"
    for output, size in enumerate(made.sizes):
        assert (shards / tar_name(output)).stat().st_size == size, tar_name(output)
        _write(shards / f"{output:08d}_stats.json", {"successes": made.samples[output]})
    names = [tar_name(output) for output in range(len(made.sizes))]
    _write(shards / "sizes.json", dict(zip(names, made.samples, strict=True)))
    listed = [{"url": name, "nsamples": n} for name, n in zip(names, made.samples, strict=True)]
    _write(shards / "index.json", {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed})
    _write(
        shards / "meta.json",
        {
            "schema_version": SCHEMA_VERSION,
            "output_shard_count": len(names),
            "output_shard_format": "{:08d}.tar",
        },
    )
    shutil.copyfile(made.ids, shards / "sample_ids.npy")
    shutil.rmtree(target, ignore_errors=True)
    shards.rename(target)


def _write(path: Path, value: Any) -> None:
    """Plainly: nobody sees the folder before its rename, and a killed `finish` writes all of it again."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def forget(folder: Path) -> None:
    """Remove the markers, once the build's manifest is there."""
    shutil.rmtree(folder, ignore_errors=True)
