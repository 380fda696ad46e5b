"""The measuring half that runs in a worker: scan a shard, measure a unit.

A unit opens its shard as a tape, decodes every image once, shows it to all
meters and writes one parquet part. Pixels stay in this process. Samples with an
error keep their row, without signals; so do those of which a signal makes no value
(`curation.columns`). A shard behind a URL is scanned and measured in one go, so
that it is fetched once.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation import store
from curation.columns import Gathering
from curation.images import decode
from curation.pool import UNREADABLE, Row, Shard, damaged_uid, read_row, uid_said, unreadable_row
from curation.selection.engine import read_columns
from curation.sidecar import Sidecar
from curation.signals.interface import Decoded, Meter, Signal
from curation.signals.service import unanswered_column
from curation.sources import Source, whole_shard
from curation.store import SignalSet, Unit
from curation.tar import Sample


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A shard to scan and to measure, as far as it is not measured."""

    shard: Shard

    def __str__(self) -> str:
        return str(self.shard)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What a worker is told once; called, it gives the function that does a shard (scan), a unit (measure) or both."""

    signals: Mapping[str, Signal]
    signal_set: SignalSet

    @property
    def gpu(self) -> bool:
        """Whether a worker needs a share of a GPU (`curation.workers`)."""
        return any(getattr(signal, "device", "cpu") == "cuda" for signal in self.signals.values())

    def __call__(self) -> Callable[[Shard | Unit | Whole], dict[str, Any]]:
        return _Measurer(self.signals, self.signal_set).do


@dataclass(frozen=True, kw_only=True)
class _Opened:
    fingerprint: str
    source: Source
    samples: list[Sample]
    damage: str | None  # "reason: detail"
    sidecar: Sidecar | None


class _Measurer:
    def __init__(self, signals: Mapping[str, Signal], signal_set: SignalSet) -> None:
        self._signals = signals
        self._set = signal_set
        self._meters: dict[str, Meter] = {}
        self._last: _Opened | None = None

    def do(self, item: Shard | Unit | Whole) -> dict[str, Any]:
        if isinstance(item, Whole):
            return self.whole(item.shard)
        return self.scan(item) if isinstance(item, Shard) else self.measure(item)

    def _open(self, shard: Shard) -> _Opened:
        """The units of one shard come one after another, so the last one is kept open."""
        if self._last is None or self._last.fingerprint != shard.fingerprint:
            self._close()
            source = whole_shard(shard.path, shard.fingerprint)
            tables = shard.sidecar is not None or shard.metadata
            sidecar = Sidecar(shard, self._set.root) if tables else None
            found, damage = source.samples()
            self._last = _Opened(
                fingerprint=shard.fingerprint,
                source=source,
                samples=found,
                damage=damage or (sidecar.damage if sidecar else None),
                sidecar=sidecar,
            )
        return self._last

    def _close(self) -> None:
        if self._last is not None:
            self._last.source.close()
            self._last = None

    def scan(self, shard: Shard) -> dict[str, Any]:
        opened = self._open(shard)
        store.write_shard_record(self._set.root, shard, len(opened.samples), opened.damage)
        return {"rows": len(opened.samples) + (opened.damage is not None)}

    def whole(self, shard: Shard) -> dict[str, Any]:
        """Scan, measure the missing units, and let go of the shard: "shard", and what `measure` says of them all."""
        self.scan(shard)
        opened = self._open(shard)
        units = store.units_of(shard, len(opened.samples), opened.damage, self._set.unit_samples)
        done = [self.measure(unit) for unit in self._set.missing(units)]
        self._close()
        errors: Counter[str] = Counter()
        for result in done:
            errors.update(result["errors"])
        causes = [line for result in done for line in result["causes"]]
        rows = sum(result["rows"] for result in done)
        return {"shard": shard.path, "rows": rows, "errors": dict(errors), "causes": causes}

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Measure a unit and write its part: {"rows": n, "errors": {reason: n}, "causes": a line for each reason of
        signals, of the first sample that has it, and one for damage of the shard}."""
        opened, modality = self._open(unit.shard), self._set.modality
        data, found = opened.source, opened.samples
        first = unit.number * self._set.unit_samples
        chosen = found[first : first + self._set.unit_samples]
        rows: list[Row] = []
        errors: list[str | None] = []

        known = store.taken_over(self._set, unit)
        meters = {name: self._meter(name) for name in self._signals if name not in known}
        gathered = Gathering(meters, self._signals)
        if opened.sidecar is not None:
            opened.sidecar.expect((sample.key, uid_said(data, sample)) for sample in chosen)
        for sample in chosen:
            try:
                row = read_row(data, sample, modality, opened.sidecar)
            except OSError:  # a file of the folder that cannot be read any more
                row = unreadable_row(sample)
            rows.append(row)
            errors.append(row.error)
            if row.error is not None or (known and not meters):
                continue
            raw, image, image_format = b"", None, ""
            if row.image is not None and modality != "texts":
                try:
                    raw = data[row.image.offset : row.image.offset + row.image.size]
                    image, image_format, errors[-1] = decode(raw)
                except OSError:
                    errors[-1] = UNREADABLE
                if image is None:
                    continue
            decoded = Decoded(
                uid=row.uid,
                caption=row.caption or "",
                image=cast(Image.Image, image),
                image_format=image_format,
                raw=raw,
                record=row.record,
            )
            gathered.see(len(rows) - 1, decoded)
        gathered.flush()
        for place, error in gathered.errors.items():
            errors[place] = error

        if known and not meters:  # other sets know every signal, and with them which images cannot be decoded
            errors = next(iter(known.values()))["error"].to_pylist()[: len(rows)]
        rest = opened.damage if first + len(chosen) == len(found) and len(chosen) < unit.rows else None
        table = _base_table(unit.shard, chosen, rows, errors, first, rest)
        for name, signal in self._signals.items():
            table = _with_signal(table, name, signal, self._set.identities[name], known.get(name, gathered))
        store.write_part(self._set.path(unit), table)
        causes = [
            f"{unit.shard.path} {chosen[place].key}: {reason}: {cause}"
            for reason, (place, cause) in gathered.causes.items()
        ]
        causes += [f"{unit.shard.path}: {rest}"] if rest is not None else []
        return {"rows": table.num_rows, "errors": count_errors(table), "causes": causes}

    def _meter(self, name: str) -> Meter:
        if name not in self._meters:
            self._meters[name] = self._signals[name].load(name)
        return self._meters[name]


def _base_table(
    shard: Shard, chosen: list[Sample], rows: list[Row], errors: list[str | None], first: int, damage: str | None
) -> pa.Table:
    records: list[dict[str, Any]] = [
        {
            "uid": row.uid,
            "key": sample.key,
            "extensions": list(sample.members),
            "offsets": [m.offset for m in sample.members.values()],
            "sizes": [m.size for m in sample.members.values()],
            "error": error,
            "caption": row.caption,
            "url": row.url,
        }
        for sample, row, error in zip(chosen, rows, errors, strict=True)
    ]
    if damage is not None:
        reason = damage.partition(":")[0]
        records.append({"uid": damaged_uid(shard), "key": "", "error": reason, "caption": None, "url": None})
    for place, record in enumerate(records):
        record["shard"], record["index"] = shard.path, first + place
    return pa.Table.from_pylist(records, schema=store.BASE)


def _with_signal(table: pa.Table, name: str, signal: Signal, identity: str, source: Gathering | pa.Table) -> pa.Table:
    """Add a signal's columns, as gathered now or known from another set; rows with an error get nulls."""
    valid = table["error"].is_null().to_numpy()
    for column, kind in signal.schema(name).items():
        if isinstance(source, pa.Table):
            values = source[column].take(pa.array(range(table.num_rows), mask=~valid))
        else:
            values = source.column(name, column, valid)
        table = table.append_column(pa.field(column, kind, metadata={"identity": identity}), values)
    return table


def count_errors(table: pa.Table) -> dict[str, int]:
    counts = table["error"].drop_null().value_counts()
    return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}


def part_errors(path: Path) -> dict[str, int]:
    """The errors of a part that was measured before."""
    return count_errors(read_columns(path, ["error"]))


def part_unanswered(services: Sequence[str], path: Path) -> dict[str, int]:
    """By service, for how many samples of a part it gave no answer."""
    table = read_columns(path, [unanswered_column(name) for name in services])
    return {name: pc.sum(table[unanswered_column(name)]).as_py() or 0 for name in services}
