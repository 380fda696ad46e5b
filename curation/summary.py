"""What the page and the dataset card say of a selection: gathered part by part, so that no process holds the pool.

Two passes over the columns. The first takes the values of a sample of rows by
hash, whose quantiles decide where each histogram begins and ends, the samples
to show and the languages; the second counts every row into the bins. So counts
are exact, only the ends of an axis are estimated in a large pool, and what the
driver holds does not grow with it. All of it depends on hash(seed, uid) alone:
neither parts, workers nor order change a number. It is kept as
OUT/report/summary.json, because the page is drawn twice and the card once.
"""

import heapq
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import store
from curation.errors import UserError
from curation.hashing import hash64_many
from curation.ledger import read_column
from curation.selection.engine import MapParts, Part, read_columns
from curation.signals.concepts import read_entries

SAMPLED = 20_000  # about so many rows decide a histogram's ends; a smaller pool decides with all of its rows
TAIL = 0.005  # of the values at either end are gathered in the end bins
BINS = 60
LARGEST = sys.float_info.max / 256  # what is beyond is in an end bin: sums of such ends have a value
SHOWN_KEPT, SHOWN_DROPPED = 18, 6  # samples of the page
Place = tuple[int, int, int]
"""(hash, part, row) of a sample to show"""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Where a column's histogram lies: `bins` of equal width from `low` to `high`."""

    low: float
    high: float
    bins: int


class Seen(NamedTuple):
    """What the first pass finds in one part: values [sampled rows, columns]."""

    values: np.ndarray
    places: dict[str, list[Place]]  # by reason, "" for kept
    languages: Counter[str]
    languages_kept: Counter[str]
    copies: Counter[int]


def summarise(
    parts: Sequence[Part], ledger: Path, manifest: Mapping[str, Any], map_parts: MapParts = map
) -> dict[str, Any]:
    """Gather what the page shows of a finished selection, as JSON.

    Args:
        ledger: the folder that `write_ledger` made of the same parts.
        manifest: with the "stages", "seed" and "config" of the selection.

    Returns:
        {"histograms": [{"column", "low", "high", "kept": [n of each bin], "dropped": [...], "thresholds": [...]}],
        "languages": [[language, seen, kept]], most frequent first; "copies": {copies: samples kept so often},
        "samples": {reason, "" for kept: [[part, row]]}, "concepts": {stage: [name of each top entry]}}
    """
    thresholds = thresholds_of(manifest["stages"])
    schema = pq.read_schema(parts[0].path)
    measured = [field for field in schema if field.name not in store.BASE.names]
    columns = [f.name for f in measured if pa.types.is_floating(f.type) or pa.types.is_signed_integer(f.type)]
    rows = sum(part.rows for part in parts)
    cut = 2**64 if rows <= SAMPLED else SAMPLED * 2**64 // rows
    look = partial(_look, ledger, manifest["seed"], cut, columns, "language" in schema.names)
    values = []
    places: dict[str, list[Place]] = defaultdict(list)
    languages, languages_kept, copies = Counter[str](), Counter[str](), Counter[int]()
    for seen in map_parts(look, list(enumerate(parts))):
        if len(seen.values):
            values.append(seen.values.copy())  # a view would keep all of the worker's answer in memory
        for reason, found in seen.places.items():
            places[reason] = heapq.nsmallest(_shown(reason), [*places[reason], *found])
        languages.update(seen.languages)
        languages_kept.update(seen.languages_kept)
        copies.update(seen.copies)

    sampled = np.concatenate([np.zeros((0, len(columns))), *values])
    axes: dict[str, Axis] = {}
    for i, column in enumerate(columns):
        finite = sampled[np.isfinite(sampled[:, i]), i]
        if len(finite):
            whole = pa.types.is_integer(schema.field(column).type)
            axes[column] = _axis(finite, thresholds.get(column, []), whole)
    counts = {column: np.zeros((2, axis.bins), np.int64) for column, axis in axes.items()}
    for counted in map_parts(partial(_count, ledger, axes), parts) if axes else ():
        for column in axes:
            counts[column] += counted[column]
    return {
        "histograms": [
            {
                "column": column,
                "low": axis.low,
                "high": axis.high,
                "kept": counts[column][0].tolist(),
                "dropped": counts[column][1].tolist(),
                "thresholds": thresholds.get(column, []),
            }
            for column, axis in axes.items()
        ],
        "languages": [[k, n, languages_kept[k]] for k, n in sorted(languages.items(), key=lambda kn: (-kn[1], kn[0]))],
        "copies": {str(n): copies[n] for n in sorted(copies)},
        "samples": {reason: [[part, row] for _, part, row in places[reason]] for reason in sorted(places)},
        "concepts": _entry_names(manifest),
    }


def thresholds_of(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """By column, the finite thresholds of all stages."""
    found: dict[str, list[float]] = defaultdict(list)
    for stage in stages:
        for column, bounds in stage.get("thresholds", {}).items():
            found[column] += [bound for bound in bounds if math.isfinite(bound)]
    return dict(found)


def _look(ledger: Path, seed: int, cut: int, columns: list[str], language: bool, item: tuple[int, Part]) -> Seen:
    """`cut`: rows with a hash below it are of the sample."""
    number, part = item
    judged = read_columns(ledger / part.path.name, ["uid", "reason", "copies"])
    table = read_columns(part.path, [*columns, *(["language"] if language else [])])
    hashes = hash64_many(f"{seed}/page", judged["uid"].to_pylist())
    copies = judged["copies"].to_numpy()
    chosen = table.filter(pa.array(hashes <= cut - 1))
    values = np.stack([_numbers(chosen, c) for c in columns], axis=1) if columns else np.zeros((chosen.num_rows, 0))

    reasons = judged["reason"].fill_null("").combine_chunks().dictionary_encode()
    places = {}
    for code, reason in enumerate(reasons.dictionary.to_pylist()):
        rows = np.flatnonzero(reasons.indices.to_numpy() == code)
        rows = rows[np.argsort(hashes[rows], kind="stable")[: _shown(reason)]]
        places[reason] = [(h, number, r) for h, r in zip(hashes[rows].tolist(), rows.tolist(), strict=True)]

    spoken, of_kept = Counter[str](), Counter[str]()
    if language:
        pairs = pa.table({"language": table["language"], "kept": pa.array(copies > 0)}).drop_null()
        for one in pairs.group_by(["language", "kept"]).aggregate([([], "count_all")]).to_pylist():
            name = one["language"] or "unknown"
            spoken[name] += one["count_all"]
            of_kept[name] += one["count_all"] * one["kept"]
    return Seen(values, places, spoken, of_kept, Counter(copies[copies > 0].tolist()))


def _shown(reason: str) -> int:
    return SHOWN_DROPPED if reason else SHOWN_KEPT


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """float64 [rows]; NaN where there is no value"""
    return table[column].cast(pa.float64(), safe=False).to_numpy()


def _axis(values: np.ndarray, bounds: Sequence[float], whole: bool) -> Axis:
    """From the sampled values (finite, float64 [m]) and the thresholds, which are always in sight."""
    low, high = np.quantile(np.clip(values, -LARGEST, LARGEST), [TAIL, 1 - TAIL]).tolist()
    low, high = max(min([low, *bounds]), -LARGEST), min(max([high, *bounds]), LARGEST)
    if whole:
        low, high = math.floor(low) - 0.5, math.ceil(high) + 0.5
    elif low == high:
        low, high = low - 0.5, high + 0.5
    finest = max(float(np.spacing(max(abs(low), abs(high)))), sys.float_info.min)
    if max((high - low) / BINS, float(whole)) <= finest:  # as of ids of 18 digits: such bins would have no ends
        return Axis(low=low - finest, high=high + finest, bins=1)
    if whole:  # bins that hold equally many whole numbers
        each = math.ceil((high - low) / BINS)
        bins = math.ceil((high - low) / each)
        return Axis(low=low, high=low + bins * each, bins=bins)
    return Axis(low=low, high=high, bins=BINS)


def _count(ledger: Path, axes: Mapping[str, Axis], part: Part) -> dict[str, np.ndarray]:
    """By column, the rows in each bin, kept and not: int64 [2, bins]."""
    table = read_columns(part.path, list(axes))
    kept = read_column(ledger, part, "copies") > 0
    counted = {}
    for column, axis in axes.items():
        values = _numbers(table, column)
        finite = np.isfinite(values)
        counted[column] = np.stack(
            [
                np.histogram(np.clip(values[finite & chosen], axis.low, axis.high), axis.bins, (axis.low, axis.high))[0]
                for chosen in (kept, ~kept)
            ]
        )
    return counted


def _entry_names(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """By stage, what the entries that its "concepts" show are called; their numbers where the list cannot be read."""
    config, names = manifest["config"], {}
    for stage in manifest["stages"]:
        if "concepts" in stage:
            signal = config["signals"].get(config["selectors"][stage["name"]]["column"], {})
            try:
                entries = read_entries(signal["metadata"])
            except (KeyError, UserError):
                entries = []
            top = [entry for _, entry, _, _ in stage["concepts"]["top"]]
            names[stage["name"]] = [entries[e] if e < len(entries) else f"entry {e}" for e in top]
    return names
