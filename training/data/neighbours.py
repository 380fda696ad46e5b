"""NegCLIP's hard pictures (arXiv 2210.01936, section 4): the nearest pictures of every picture of a folder of shards.

    gemsmith neighbours --shards CURATED/shards --signals CURATED/signals

reads the image embeddings that curation measured (clip_score) and writes SHARDS/neighbours.npy, the numbers of the `k`
most similar other samples of each, by FAISS's exact search. With `loader.neighbours: true` the loader then puts one of
them, drawn anew in each epoch, after every sample, with its own caption and swaps: a batch is half drawn and half near.
"""

from pathlib import Path
from typing import Any

import numpy as np

from curation.errors import UserError
from training.data.shards import Shards

FILE = "neighbours.npy"
"""int32 [samples, k], beside the shards."""
BLOCK = 4096  # samples that are searched at once


def find_neighbours(shards: Path, signals: Path, column: str = "clip_image_embedding", k: int = 3) -> np.ndarray:
    """Write and return the k nearest of each sample, by cosine; a sample is no neighbour of its own.

    Raises:
        UserError: no embeddings there, or not of every sample; fewer than k others.
    """
    import faiss

    from curation.selection.nearest import one_thread

    samples = Shards(shards)
    if not 0 < k < len(samples):
        raise UserError(f"--k {k}: {shards} holds {len(samples)} samples; give 1 to {len(samples) - 1}")
    numbers = {samples.sample(i)["uid"]: i for i in range(len(samples))}
    if len(numbers) < len(samples):
        raise UserError(f"--shards {shards}: two samples have one uid, and signals go by uids; curate them first")
    embedded = _embeddings(signals, column, numbers, shards)
    found = np.empty((len(embedded), k), np.int32)
    with one_thread():
        index: Any = faiss.IndexFlatIP(embedded.shape[1])
        index.add(embedded)
        for start in range(0, len(embedded), BLOCK):
            near = index.search(embedded[start : start + BLOCK], k + 1)[1]  # itself among them, or a copy before it
            own = np.arange(start, start + len(near))[:, None]
            others = np.argsort(near == own, axis=1, kind="stable")[:, :k]
            found[start : start + BLOCK] = np.take_along_axis(near, others, 1)
    np.save(shards / FILE, found)
    return found


def _embeddings(signals: Path, column: str, numbers: dict[str, int], shards: Path) -> np.ndarray:
    """float32 [samples, D] of norm 1."""
    import pyarrow.parquet as pq

    from curation.selection.clustering import embeddings

    found: np.ndarray | None = None
    known = np.zeros(len(numbers), bool)
    for file in sorted(signals.rglob("*.parquet")):
        if not {"uid", column} <= set(pq.read_schema(file).names):
            continue
        table = pq.read_table(file, columns=["uid", column])
        table = table.filter(table[column].is_valid())
        rows = np.array([numbers.get(uid, -1) for uid in table["uid"].to_pylist()], np.int64)
        values = embeddings(table, column)[rows >= 0].astype(np.float32)
        if found is None:
            found = np.zeros((len(numbers), table.schema.field(column).type.list_size), np.float32)
        found[rows[rows >= 0]] = values
        known[rows[rows >= 0]] = True
    if found is None:
        raise UserError(f"--signals {signals}: no column {column}; curate with a signal clip_score, or name --column")
    if not known.all():
        raise UserError(f"--signals {signals}: {(~known).sum()} of {len(known)} samples of {shards} have no {column}")
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def read_neighbours(folder: str, total: int) -> np.ndarray:
    """int32 [total, k] of a folder of shards.

    Raises:
        UserError: they were not made, or of other shards.
    """
    file = Path(folder) / FILE
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError):
        raise UserError(f"loader.neighbours: {file} is not there; make it by `gemsmith neighbours`") from None
    if found.ndim != 2 or len(found) != total:
        raise UserError(f"loader.neighbours: {file} is of {len(found)} samples, not {total}; make it again")
    return found
