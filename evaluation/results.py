"""The results file: one JSON line a number, appended whole, identified by content.

All lines of a task go into one `write` on a file opened with O_APPEND, so
several evaluations may share a file. One that was killed, or whose disk was
full, leaves a block that ends early, perhaps in the middle of a line, which the
next append closes. The details of a result name all of its metrics, and readers
pass over one that is not whole: the task is graded again. A task that was already
graded (the same weights, data, settings and library versions, whatever
the files are called) is found by its hash and not graded again.

Scores by query and written captions lie beside the file in
`STEM.details/HASH/`, for paired tests and for pages; they are written before
the lines that name them.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curation.errors import UserError
from curation.manifest import SCHEMA_VERSION
from evaluation.statistics import Interval

METRICS = "metrics.json"
NAMED = {"metric", "hashes", "details"}
"""What every line of ours has and hardly a line of another file."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of a task: `n` queries, the score of guessing (None where there is no such thing), its interval."""

    metric: str
    value: float
    n: int
    chance: float | None
    ci95: Interval


@dataclass(frozen=True, kw_only=True)
class Graded:
    """What a task returns.

    `per_query` holds an array [n] for every metric that is a mean (or median)
    over queries, and under `cluster/METRIC` the cluster of each query where
    queries are not independent. `records` are written out as JSON lines.
    `queries` is a hash of them where the model has a say in which they are:
    only equal ones can be compared.
    """

    measurements: list[Measurement]
    per_query: dict[str, np.ndarray] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    queries: str | None = None


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a results file, result by result, each once; torn lines and results are passed over with a word.

    Raises:
        UserError: there is no such file, it is of something else, or it was written by a newer version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such results file; write one with `gemsmith evaluate --out {path}`")
    results: dict[str, dict[str, dict[str, Any]]] = {}  # by hash and metric
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            print(f"{path}:{number}: passed over a torn line", flush=True)
            continue
        version = row.get("schema_version") if isinstance(row, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UserError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}; update gemsmith")
        if version is None or not row.keys() >= NAMED or "result" not in row["hashes"]:
            raise UserError(f"{path}:{number}: is no line of results; name a file that `gemsmith evaluate` wrote")
        results.setdefault(row["hashes"]["result"], {})[row["metric"]] = row
    found: list[dict[str, Any]] = []
    for rows in results.values():
        if missing := _metrics(path, next(iter(rows.values()))) - rows.keys():
            print(f"{path}: passed over a result that was not written whole, without {min(missing)}", flush=True)
        else:
            found += rows.values()
    return found


def _metrics(path: Path, row: Mapping[str, Any]) -> set[str]:
    """All of this row's result, as far as its details are at hand."""
    file = path.parent / row["details"] / METRICS
    return set(json.loads(file.read_text())) if file.exists() else set()


def check_writable(out: Path, cache: Path | None = None) -> None:
    """Refuse a results file, or a folder of embeddings, that could not be written to; better now than after the work.

    Leaves nothing: of a folder that is not there yet, the one above is tried.

    Raises:
        UserError: it cannot be written to, the disk is full, or `out` is no results file.
    """
    for option, path, folder in (("--out", out, out.parent), *([("--cache", cache, cache)] if cache else [])):
        try:
            there = next(place for place in (folder, *folder.parents) if place.exists())
            with tempfile.TemporaryFile(dir=there) as probe:
                probe.write(bytes(4096))
            if path == out and out.exists():
                os.close(os.open(out, os.O_WRONLY | os.O_APPEND))
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"{option} {path}: cannot be written ({why}); name another, or make room") from None
    if out.exists():
        read(out)


def find(path: Path, result_hash: str) -> list[dict[str, Any]]:
    """The rows of this result, none where it was not graded yet."""
    return [row for row in read(path) if row["hashes"]["result"] == result_hash] if path.exists() else []


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            block = b"\n" + block  # close the line that a killed writer left open
        written = os.write(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if written != len(block):
        raise OSError(errno.ENOSPC, f"{path}: only {written} of {len(block)} bytes were written")


def save_details(path: Path, result_hash: str, graded: Graded, left_out: list[dict[str, str]]) -> str:
    """Write what belongs to a result beside the results file.

    Returns:
        The folder, relative to the results file's folder.
    """
    name = f"{path.stem}.details/{result_hash}"
    folder = path.parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).write_text(json.dumps([measurement.metric for measurement in graded.measurements]))
    if graded.per_query:
        np.savez(folder / "per_query.npz", **graded.per_query)  # type: ignore[arg-type]
    for file, records in (("records.jsonl", graded.records), ("left_out.jsonl", left_out)):
        if records:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / file).write_text(lines)
    return name


def per_query(path: Path, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The scores by query behind a row of this results file, and their clusters (None where queries are independent).

    None where the metric is not a mean over queries or the file is gone.
    """
    file = path.parent / row["details"] / "per_query.npz"
    if not file.exists():
        return None
    with np.load(file) as arrays:
        if row["metric"] not in arrays:
            return None
        return arrays[row["metric"]], arrays.get(f"cluster/{row['metric']}")


def records(path: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records behind a row (for captioning: uid, caption, references, cider_d), none where there are none."""
    file = path.parent / row["details"] / "records.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().split("\n")  # and at no other ends of lines: captions hold U+2028 and its like
    return [json.loads(line) for line in lines if line]
