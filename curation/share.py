"""`gemsmith share`: what was measured and decided, in the files that tools of the field read.

clip-retrieval: img_emb/img_emb_N.npy and text_emb/text_emb_N.npy (float16 [n, D], unit norm), and with their rows
  metadata/metadata_N.parquet; of what is kept, to be indexed and searched
datacomp: N.parquet, and N.npz with its rows' l14_img, l14_txt, ...; of all that is readable, for DataComp's baselines
semdedup: removed.parquet, whose column `id` names what selectors of kind semantic_duplicates drop

A file holds a partition of the pool, so no process holds more. A row whose signal gave it no vector has NaN in its
place; clip-retrieval, whose vectors are indexed, has no row without a picture's. Text embeddings are there where the
recipe's signal has `text_embedding: true`.
"""

import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.errors import UserError
from curation.manifest import read_manifest
from curation.phases import recorded_parts
from curation.selection.clustering import embeddings, having
from curation.selection.engine import Partition, partitions
from curation.signals.clip import embedding_column, text_column

LAYOUTS = ("clip-retrieval", "datacomp", "semdedup")
OF_DATACOMP = re.compile(r"clip_(\w+)_similarity_score")


class Rows(NamedTuple):
    """Rows of one partition that go out; `number` of the partition, and how many digits those have."""

    table: pa.Table
    number: int
    digits: int


def share(out: Path, to: Path, layout: str, signal: str | None = None) -> int:
    """Write the folder `to` and return how many rows it has.

    Args:
        out: what `curate` wrote.
        layout: one of LAYOUTS.
        signal: for clip-retrieval, whose embeddings, where the recipe has several of kind clip.

    Raises:
        UserError: no finished selection in `out`, `to` exists, or nothing was measured that the layout needs.
    """
    parts, selected = recorded_parts(out), read_manifest(out / "select.manifest.json")
    if parts is None or selected is None:
        raise UserError(f"--out {out}: holds no selection; run `gemsmith curate` to its end first")
    if to.exists():
        raise UserError(f"--to {to}: is there already; name a new folder")
    config = selected["config"]
    clips = [name for name, settings in config["signals"].items() if settings["kind"] == "clip"]
    if layout == "clip-retrieval":
        clips = [_one(clips, signal)]
    removing = [name for name, settings in config["selectors"].items() if settings["kind"] == "semantic_duplicates"]
    if layout == "semdedup" and not removing:
        raise UserError(f"--out {out}: its recipe has no selector of kind semantic_duplicates, so nothing is removed")
    pool = partitions(parts)
    temporary = to.with_name(f".{to.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    written, removed = 0, []
    try:
        for partition in pool:
            table, ledger = _read(partition, out, clips)
            if layout == "semdedup":
                gone = [not set(removing).isdisjoint(failed or ()) for failed in ledger["failed"].to_pylist()]
                removed.append(table.filter(pa.array(gone, pa.bool_()))["uid"].combine_chunks())
                written += len(removed[-1])
                continue
            verdict = "kept" if layout == "clip-retrieval" else "error"
            chosen = pc.equal(ledger["verdict"], verdict)
            table = table.filter(chosen if verdict == "kept" else pc.invert(chosen))
            if layout == "clip-retrieval":  # an index holds no vector that is missing
                table = having(table, embedding_column(clips[0]))
            rows = Rows(table, partition.number, len(str(len(pool))))
            if layout == "clip-retrieval":
                _clip_retrieval(temporary, rows, clips[0])
            else:
                _datacomp(temporary, rows, clips)
            written += table.num_rows
        if layout == "semdedup":
            pq.write_table(pa.table({"id": pa.chunked_array(removed)}), temporary / "removed.parquet")
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _one(clips: Sequence[str], signal: str | None) -> str:
    if not clips:
        raise UserError("--layout clip-retrieval: the recipe has no signal of kind clip, so there are no embeddings")
    if signal not in clips and (signal is not None or len(clips) > 1):
        raise UserError(f"--signal {signal}: name one of {', '.join(clips)}")
    return signal or clips[0]


def _read(partition: Partition, out: Path, clips: Sequence[str]) -> tuple[pa.Table, pa.Table]:
    """(signals without what is only ours, ledger) of a partition, row by row"""
    schema = pq.read_schema(partition.parts[0].path)
    vectors = [c for name in clips for c in (embedding_column(name), text_column(name)) if c in schema.names]
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    names = [name for name in plain if name not in ("index", "error")] + vectors
    judged = [pq.read_table(out / "ledger" / part.path.name, columns=["verdict", "failed"]) for part in partition.parts]
    return partition.read(names), pa.concat_tables(judged)


def _clip_retrieval(folder: Path, rows: Rows, clip: str) -> None:
    number = str(rows.number).zfill(rows.digits)
    for kind, column in (("img_emb", embedding_column(clip)), ("text_emb", text_column(clip))):
        if column in rows.table.schema.names:
            (folder / kind).mkdir(exist_ok=True)
            np.save(folder / kind / f"{kind}_{number}.npy", embeddings(rows.table, column))
    plain = rows.table.select([f.name for f in rows.table.schema if not pa.types.is_nested(f.type)])
    plain = plain.add_column(0, "image_path", plain["uid"])
    (folder / "metadata").mkdir(exist_ok=True)
    pq.write_table(_bare(plain), folder / "metadata" / f"metadata_{number}.parquet")


def _datacomp(folder: Path, rows: Rows, clips: Sequence[str]) -> None:
    """Columns by DataComp's names; the picture's size stands in where its original's was not measured."""
    table = rows.table
    arrays: dict[str, Any] = {}
    for clip in clips:
        found = OF_DATACOMP.fullmatch(clip)
        model = found[1] if found else clip.removesuffix("_score")
        for kind, column in (("img", embedding_column(clip)), ("txt", text_column(clip))):
            if column in table.schema.names:
                arrays[f"{model}_{kind}"] = embeddings(table, column)
    columns: dict[str, Any] = {"uid": table["uid"], "url": table["url"], "text": table["caption"]}
    for side in ("width", "height"):
        measured: Mapping[str, Any] = {n: table[n] for n in (f"original_{side}", side) if n in table.schema.names}
        if measured:
            columns[f"original_{side}"] = pc.coalesce(*measured.values()).cast(pa.int64())
    read = [name for name in table.schema.names if OF_DATACOMP.fullmatch(name)]  # with DataComp's metadata
    columns |= {score: table[score] for score in dict.fromkeys([*clips, *read])}
    if "image_sha256" in table.schema.names:
        columns["sha256"] = pa.array([digest.hex() for digest in table["image_sha256"].to_pylist()], pa.string())
    number = f"{rows.number:08d}"
    pq.write_table(_bare(pa.table(columns)), folder / f"{number}.parquet")
    np.savez(folder / f"{number}.npz", **arrays)


def _bare(table: pa.Table) -> pa.Table:
    """Without what our store notes about its columns."""
    return table.cast(pa.schema([field.remove_metadata() for field in table.schema]))
