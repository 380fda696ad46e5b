"""The signal store: what was measured, kept by what it was measured of and how.

    STORE/shards/<fingerprint>.json          how many samples a shard has, and what damaged it
    STORE/<set>/set.json                     the identities of the signals of this set
    STORE/<set>/<fingerprint>-<unit>.parquet one row for each of at most `unit_samples` samples

A set is named by a hash of its signals' identities, a part by the shard's
fingerprint and its unit. So a part, once there, is right for ever: a run that
was killed, a pool that has grown and a recipe with other thresholds all find
what is done by name alone. Each column carries the identity of the signal that
made it, so that another set of the store can take it over without measuring.
"""

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import signals as signal_kinds
from curation.files import STORE_MARK
from curation.hashing import config_hash
from curation.manifest import read_manifest, write_manifest
from curation.pool import Modality, Shard
from curation.signals.interface import Signal

BASE_VERSION = 3  # goes up when the columns below, or the errors, would come out otherwise
SIGNAL_FAILED, NOT_FINITE = "signal_failed", "not_finite"
"""The errors that depend on the signals of a set: its rows lack what other signals would have given."""
BASE = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("index", pa.int32()),
        ("extensions", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("error", pa.string()),
        ("caption", pa.string()),
        ("url", pa.string()),
    ]
)
"""What every part has: where the sample lies (member by member, so that build
copies without scanning again), what is wrong with it, and what it says."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The samples [number * unit_samples, (number + 1) * unit_samples) of a shard; `rows` of them, errors included."""

    shard: Shard
    number: int
    rows: int

    def __str__(self) -> str:
        return f"{self.shard}, unit {self.number} ({self.rows} samples)"

    @property
    def part(self) -> str:
        return f"{self.shard.fingerprint}-{self.number:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class SignalSet:
    """One folder of the store. `identities` are of the signals that the recipe needs."""

    root: Path
    folder: Path
    identities: dict[str, str]
    unit_samples: int
    modality: Modality = "pairs"

    def path(self, unit: Unit) -> Path:
        return self.folder / unit.part

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [unit for unit in units if unit.part not in present]


def mark(root: Path) -> None:
    """Say that this folder is a store, so that it is no part of a pool that it lies in."""
    if not (path := root / STORE_MARK).exists():
        write_manifest(path, {"holds": "signals"})


def open_set(
    root: Path,
    signals: Mapping[str, Signal],
    unit_samples: int,
    units: Sequence[Unit] | None,
    modality: Modality = "pairs",
) -> SignalSet:
    """The set that a recipe with these signals uses.

    It is the set of exactly these signals, unless that one lacks some of
    `units` and a set of more signals has them all. Writes nothing.

    Raises:
        UserError: a file that a signal names cannot be read.
    """
    identities = {name: signal_kinds.identity(name, signal) for name, signal in signals.items()}
    which = [BASE_VERSION, unit_samples, sorted(identities.values()), *([] if modality == "pairs" else [modality])]
    own = SignalSet(
        root=root,
        folder=root / config_hash(which),
        identities=identities,
        unit_samples=unit_samples,
        modality=modality,
    )
    if units is None or not own.missing(units):
        return own
    for other, found in _sets(own):
        candidate = replace(own, folder=other)
        enough = set(identities.values()) <= set(found.values()) and not candidate.missing(units)
        if enough and not any(_failed(candidate.path(unit)) for unit in units):
            return candidate
    return own


def describe_set(signal_set: SignalSet) -> None:
    """Write the set's `set.json`, where it is not there yet."""
    path = signal_set.folder / "set.json"
    if not path.exists():
        write_manifest(
            path,
            {
                "base_version": BASE_VERSION,
                "unit_samples": signal_set.unit_samples,
                "modality": signal_set.modality,
                "identities": signal_set.identities,
            },
        )


def _sets(like: SignalSet) -> list[tuple[Path, dict[str, str]]]:
    """The store's sets of this unit size and modality, with their identities."""
    found = []
    for path in sorted(like.root.glob("*/set.json")):
        meta = read_manifest(path)
        same = (BASE_VERSION, like.unit_samples, like.modality)
        if meta and (meta["base_version"], meta["unit_samples"], meta.get("modality", "pairs")) == same:
            found.append((path.parent, meta["identities"]))
    return found


def taken_over(signal_set: SignalSet, unit: Unit) -> dict[str, pa.Table]:
    """By signal name, the columns that other sets of the store already have for this unit, and "error" beside them."""
    found: dict[str, pa.Table] = {}
    for folder, identities in _sets(signal_set):
        path = folder / unit.part
        wanted = {
            name: identity
            for name, identity in signal_set.identities.items()
            if name not in found and identity in identities.values()
        }
        if folder == signal_set.folder or not wanted or not path.exists() or _failed(path):
            continue
        schema = pq.read_schema(path)
        for name, identity in wanted.items():
            columns = [f.name for f in schema if (f.metadata or {}).get(b"identity") == identity.encode()]
            found[name] = pq.read_table(path, columns=["error", *columns])
    return found


def _failed(path: Path) -> bool:
    """Whether a signal failed on a sample of this part, so that only runs with the same signals may use it."""
    errors = pq.read_table(path, columns=["error"])["error"].unique().to_pylist()
    return SIGNAL_FAILED in errors or NOT_FINITE in errors


def write_part(path: Path, table: pa.Table) -> None:
    """Write a part through a unique temporary name: two workers that do the same unit leave the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shard_record(root: Path, shard: Shard) -> dict[str, Any] | None:
    """What is known of a shard: {"samples", "damage"}, or None where it was not scanned yet."""
    return read_manifest(root / "shards" / f"{shard.fingerprint}.json")


def write_shard_record(root: Path, shard: Shard, samples: int, damage: str | None) -> None:
    path = root / "shards" / f"{shard.fingerprint}.json"
    write_manifest(path, {"path": shard.path, "samples": samples, "damage": damage})


def units_of(shard: Shard, samples: int, damage: str | None, unit_samples: int) -> list[Unit]:
    """The units of a shard; what damaged its rest is one more row of the last of them."""
    rows = samples + (damage is not None)
    return [
        Unit(shard=shard, number=n, rows=min(unit_samples, rows - start))
        for n, start in enumerate(range(0, rows, unit_samples))
    ]
