"""The three phases: what each finds done, does, counts and writes.

Measure finds the parts that are in the store, select is quick and starts over,
build finds the markers of the shards it has copied, and the checksums of the
shards, which end a run, those that it has taken. Counts are checked where
they arise: seen = kept + dropped + errors at every stage, or the run fails.
"""

import itertools
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from curation import shards as building
from curation import store
from curation.budget import Expected, check_budget
from curation.config import CurateConfig
from curation.croissant import Tar, digest, recorded
from curation.errors import UserError
from curation.hashing import config_hash
from curation.ledger import write_ledger
from curation.manifest import read_manifest, write_manifest
from curation.measure import Measuring, Whole, part_errors, part_unanswered
from curation.plan import plan
from curation.pool import Shard
from curation.report import write_report
from curation.selection import engine
from curation.selection.engine import Part
from curation.sidecar import index_folder, make_index
from curation.signals import made_by
from curation.signals.service import Service
from curation.spread import spread
from curation.store import SignalSet, Unit
from curation.summary import summarise
from curation.workers import Workers, progress, say


@dataclass(frozen=True, kw_only=True)
class Run:
    """One invocation: the checked arguments and what follows from them."""

    config: CurateConfig
    pool: list[Shard]
    out: Path
    root: Path  # of the signal store
    slice: tuple[int, int] | None
    workers: Workers
    identity: dict[str, Any]
    read: dict[str, str]  # by selector, what names the content of the files that it reads

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """The items of this slice: those whose `index` (an input shard's place in the pool) is its turn."""
        if self.slice is None:
            return list(items)
        number, of = self.slice
        return [item for item in items if item.index % of == number - 1]

    @property
    def build_folder(self) -> Path:
        """Named by the run, so that workers that outlive a killed run can only write what this one would."""
        return self.out / f".build-{config_hash([self.identity, self.read])}"


def known_units(run: Run, shards: Sequence[Shard]) -> list[Unit] | None:
    """The units of these shards, or None where one was not scanned yet."""
    units: list[Unit] = []
    for shard in shards:
        record = store.shard_record(run.root, shard)
        if record is None:
            return None
        units += store.units_of(shard, record["samples"], record["damage"], run.config.unit_samples)
    return units


def signal_set_of(run: Run, units: list[Unit] | None) -> SignalSet:
    return store.open_set(run.root, run.config.signals, run.config.unit_samples, units, run.config.modality)


def measure(run: Run) -> dict[str, Any]:
    began, started = time.perf_counter(), run.workers.start_seconds
    if not run.root.is_relative_to(run.out.resolve()):
        store.mark(run.root)
    mine = run.mine(run.pool)
    unscanned = [shard for shard in mine if store.shard_record(run.root, shard) is None]
    setup = Measuring(signals=run.config.signals, signal_set=signal_set_of(run, None))
    here = [shard for shard in unscanned if not shard.whole]
    _index_metadata(run, here)
    for _ in progress(run.workers.map(setup, here), label="scan", total=len(here), unit="shards", amount=_one):
        pass
    unseen = {shard.path: shard for shard in unscanned if shard.whole}
    seen = [shard for shard in mine if shard.path not in unseen]
    known = known_units(run, seen)
    assert known is not None
    signal_set = signal_set_of(run, None if unseen else known)
    store.describe_set(signal_set)
    missing = signal_set.missing(known)
    errors = _errors_there(run, signal_set, known, missing)
    expected = Expected(sum(unit.rows for unit in known), seen, list(unseen.values()))
    _judge(run, errors, expected.samples)
    wanted = unseen.keys() | {unit.shard.path for unit in missing}
    whole = [Whole(shard=shard) for shard in mine if shard.whole and shard.path in wanted]
    setup = Measuring(signals=run.config.signals, signal_set=signal_set)
    _index_metadata(run, [one.shard for one in whole])
    measured = 0
    results = run.workers.map(setup, whole)
    for result in progress(results, label="measure", total=len(whole), unit="shards", amount=_one):
        measured += _counted(result, errors)
        expected.found(result["shard"], result["rows"])
        _judge(run, errors, expected.samples)
    units = known_units(run, mine)
    assert units is not None
    rows = sum(unit.rows for unit in units)
    if not rows and run.slice is None:
        raise UserError("--pool: the shards hold no samples; name a pool that has some")
    missing = signal_set.missing(units)
    _index_metadata(run, [unit.shard for unit in missing])
    results = run.workers.map(setup, missing)
    total = sum(unit.rows for unit in missing)
    for result in progress(results, label="measure", total=total, unit="pairs", amount=lambda r: r["rows"]):
        measured += _counted(result, errors)
        _judge(run, errors, rows)
    _judge(run, errors, rows)
    wall = time.perf_counter() - began
    manifest = {
        "phase": "measure",
        "seen": rows,
        "errors": dict(sorted(errors.items())),
        "signal_set": _from_out(run, signal_set.folder),
        "parts": [unit.part for unit in units],
        "rows": [unit.rows for unit in units],
        "unanswered": _unanswered(run, signal_set, units),
        "measured": measured,
        **_speed(measured, wall, run.workers.start_seconds - started),
    }
    if run.slice is None:
        write_manifest(run.out / "measure.manifest.json", manifest)
    return manifest


def _index_metadata(run: Run, shards: Sequence[Shard]) -> None:
    """Make what finds these shards' rows of metadata, before every worker looks there."""
    for names, tables in dict.fromkeys((shard.metadata, shard.tables) for shard in shards if shard.metadata):
        make_index(index_folder(run.root, names, tables), names, spread(run.workers, names, "index"))


def _errors_there(run: Run, signal_set: SignalSet, known: Sequence[Unit], missing: Sequence[Unit]) -> Counter[str]:
    """The errors of what was measured before."""
    lacking = {unit.part for unit in missing}
    there = [unit for unit in known if unit.part not in lacking]
    return sum(_of_parts(run, signal_set, there, part_errors, "errors"), Counter())


def _unanswered(run: Run, signal_set: SignalSet, units: Sequence[Unit]) -> dict[str, int]:
    """By service, for how many samples it gave no answer, which is said."""
    services = [name for name, signal in run.config.signals.items() if isinstance(signal, Service)]
    count = partial(part_unanswered, services)
    found = sum(_of_parts(run, signal_set, units if services else [], count, "unanswered"), Counter())
    for name in found:
        say(f"measure: service {name} gave no answer for {found[name]} samples; another `revision` asks again")
    return {name: found[name] for name in services}


def _of_parts(
    run: Run, signal_set: SignalSet, units: Sequence[Unit], count: Callable[[Path], dict[str, int]], label: str
) -> Iterator[Counter[str]]:
    """What is counted in each unit's part."""
    parts = _in_order(signal_set.folder, [unit.part for unit in units], [unit.rows for unit in units])
    return map(Counter, spread(run.workers, engine.partitions(parts), label)(count, [part.path for part in parts]))


def _judge(run: Run, errors: Counter[str], seen: int) -> None:
    """A slice may be as broken as it is: what that is of the pool is seen when all of them are there."""
    if run.slice is None or not run.config.max_error_rate:
        check_budget(errors, seen, run.config.max_error_rate)


def _counted(result: Mapping[str, Any], errors: Counter[str]) -> int:
    """Count what a worker measured, and say of what its first samples died; how many rows they are."""
    errors.update(result["errors"])
    for cause in result["causes"]:
        say(f"measure: {cause}")
    return int(result["rows"])


def _one(_: Any) -> int:
    return 1


def _from_out(run: Run, folder: Path) -> str:
    """Relative to OUT where it lies in it, so that a moved OUT still finds its signals."""
    out = run.out.resolve()
    return str(folder.relative_to(out) if folder.is_relative_to(out) else folder)


def measured_parts(run: Run) -> list[Part]:
    """The measured parts in the pool's order; where the store has them all and OUT does not say so yet, it does then.

    Raises:
        UserError: something of the pool is not measured, or more of it than may be cannot be used.
    """
    if not (run.out / "measure.manifest.json").exists():
        units = known_units(run, run.pool)
        if units is None or signal_set_of(run, units).missing(units):
            raise UserError(
                f"--signals {run.root}: this pool is not measured there with this recipe's signals; "
                "run --phase measure (or all) first"
            )
        measure(replace(run, slice=None))
    parts = recorded_parts(run.out)
    assert parts is not None
    return parts


def recorded_parts(out: Path) -> list[Part] | None:
    """The parts that OUT's own measurement wrote, in the pool's order; None where it did not finish."""
    measured = read_manifest(out / "measure.manifest.json")
    if measured is None:
        return None
    return _in_order(out / measured["signal_set"], measured["parts"], measured["rows"])


def _in_order(folder: Path, names: Sequence[str], rows: Sequence[int]) -> list[Part]:
    firsts = itertools.accumulate(rows, initial=0)
    return [Part(path=folder / name, first=first, rows=n) for name, n, first in zip(names, rows, firsts)]


def select(run: Run) -> dict[str, Any]:
    parts = measured_parts(run)
    began, started = time.perf_counter(), run.workers.start_seconds
    pool = engine.partitions(parts)
    map_parts = spread(run.workers, pool, "select")
    for leftover in run.out.glob(".select-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = run.out / f".select-{uuid.uuid4().hex}"
    selection = engine.run(run.config.selectors, pool, folder, map_parts)
    counts = write_ledger(run.out / "ledger", pool, selection, map_parts)
    shutil.rmtree(folder, ignore_errors=True)
    stages = [_decode_stage(counts), *selection.stages]
    _check_conservation(counts, stages, sum(part.rows for part in parts))
    wall = time.perf_counter() - began
    manifest = {
        "phase": "select",
        **counts,
        "stages": stages,
        "config": run.config.to_dict(),
        "seed": run.config.seed,
        "made_by": made_by(run.config.signals),
        "read": run.read,
        **_speed(counts["seen"], wall, run.workers.start_seconds - started),
    }
    summary_path(run).unlink(missing_ok=True)  # of a selection that was killed here
    said = summary(run, manifest, parts)
    measured = read_manifest(run.out / "measure.manifest.json")
    write_report(run.out, manifest, parts, {"measure": measured, "select": manifest}, said)
    write_manifest(run.out / "select.manifest.json", manifest)
    return manifest


def summary_path(run: Run) -> Path:
    return run.out / "report" / "summary.json"


def summary(run: Run, selected: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """What the page shows of this selection: as it was gathered, or gathered now where the file is gone."""
    path = summary_path(run)
    if not path.exists():
        write_manifest(
            path, summarise(parts, run.out / "ledger", selected, spread(run.workers, engine.partitions(parts), "page"))
        )
    found = read_manifest(path)
    assert found is not None
    return found


def _decode_stage(counts: dict[str, Any]) -> dict[str, Any]:
    errors = sum(counts["errors"].values())
    return {"name": "readable", "in": counts["seen"], "out": counts["seen"] - errors, "dropped": errors}


def _check_conservation(counts: dict[str, Any], stages: list[dict[str, Any]], rows: int) -> None:
    """No sample is lost or counted twice, in all and at each stage."""
    spent = counts["kept"] + sum(counts["dropped"].values()) + sum(counts["errors"].values())
    if not counts["seen"] == rows == spent:
        raise RuntimeError(f"conservation: {rows} measured, {counts['seen']} in the ledger, {spent} accounted for")
    flow = counts["seen"]
    for stage in stages:
        if stage["in"] != flow or stage["in"] - stage["dropped"] != stage["out"]:
            raise RuntimeError(f"conservation: stage {stage} does not follow on {flow}")
        flow = stage["out"]
        if stage["name"] != "readable" and stage["dropped"] != counts["dropped"].get(stage["name"], 0):
            raise RuntimeError(f"conservation: stage {stage} and ledger {counts['dropped']} differ")
    if flow != counts["kept"]:
        raise RuntimeError(f"conservation: {flow} left the last stage, {counts['kept']} are kept")


def build(run: Run) -> dict[str, Any]:
    selected = read_manifest(run.out / "select.manifest.json")
    if selected is None:
        raise UserError(f"--out {run.out}: nothing is selected there; run --phase select (or all) first")
    parts = measured_parts(run)
    began, started = time.perf_counter(), run.workers.start_seconds
    ledger, target, folder = run.out / "ledger", run.out / "shards", run.build_folder
    building.prepare(folder)
    planned = folder / f"plan-{uuid.uuid4().hex}"  # by the run, since slices build side by side
    pool = engine.partitions(parts)
    made = plan(
        pool,
        ledger,
        planned,
        seed=run.config.seed,
        shard_samples=run.config.shard_samples,
        members=run.config.members,
        map_parts=spread(run.workers, pool, "plan"),
    )
    copied = Counter[str]()
    if not target.exists():
        mine = [source for source in run.mine(made.inputs) if not building.marker(folder, source).exists()]
        total = sum(source.kept for source in mine)
        results = run.workers.map(building.Copying(folder, made), mine)
        for result in progress(results, label="build", total=total, unit="samples", amount=lambda r: r["samples"]):
            copied.update(result)
        if run.slice is None:
            building.finish(folder, target, made)
    manifest = {
        "phase": "build",
        "shards": len(made.sizes),
        "samples": sum(made.samples),
        "bytes": sum(made.sizes),
        "copied": copied["samples"],
        **_speed(copied["samples"], time.perf_counter() - began, run.workers.start_seconds - started),
    }
    if run.slice is None:
        if manifest["samples"] != selected["kept"]:
            raise RuntimeError(f"conservation: {selected['kept']} kept, {manifest['samples']} in the shards")
        write_manifest(run.out / "build.manifest.json", manifest)
        building.forget(folder)
    return manifest


def checksums(run: Run) -> tuple[list[Tar], dict[str, Any]]:
    """The digest of every shard, each read once, however often the run is killed; and how fast that went."""
    began, started = time.perf_counter(), run.workers.start_seconds
    shards, records = run.out / "shards", run.build_folder / "checksums"
    sizes = read_manifest(shards / "sizes.json")
    assert sizes is not None
    missing = [name for name in sizes if recorded(records, name) is None]
    results = run.workers.map(lambda: partial(digest, records), [shards / name for name in missing])
    for _ in progress(results, label="checksums", total=len(missing), unit="shards", amount=_one):
        pass
    tars = [tar for name in sizes if (tar := recorded(records, name))]
    assert len(tars) == len(sizes)
    pairs = sum(sizes[name] for name in missing)
    return tars, _speed(pairs, time.perf_counter() - began, run.workers.start_seconds - started)


def _speed(pairs: int, wall: float, starting: float) -> dict[str, Any]:
    """Ray's start is counted apart: it is the same for a thousand pairs and a billion."""
    working = max(wall - starting, 1e-9)
    return {
        "wall_s": round(wall, 3),
        "ray_start_s": round(starting, 3),
        "pairs_per_s": round(pairs / working, 1),
    }
