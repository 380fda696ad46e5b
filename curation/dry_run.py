"""`gemsmith curate --dry-run`: what each phase finds done and would do. Reads file sizes, the store and OUT, writes
nothing and starts no Ray, so what lies in shards that nobody has looked into yet is not known."""

from collections.abc import Sequence
from typing import Any

from curation import phases, store
from curation.manifest import differing, read_manifest
from curation.phases import Run


def dry_run(run: Run, wanted: Sequence[str]) -> dict[str, Any]:
    """Print what these phases would do, and return it.

    Returns:
        {"pool": {"shards", "bytes"}, "refused": what of the run that OUT holds is different, and for each phase its
        counts below and "done"}
    """
    said: dict[str, Any] = {
        "pool": {"shards": len(run.pool), "bytes": sum(shard.size for shard in run.pool)},
        "refused": differing(run.out, run.identity),
    }
    print(f"pool: {said['pool']['shards']:,} shards, {said['pool']['bytes'] / 1e6:,.1f} MB")
    if said["refused"]:
        print(f"{run.out}: holds another run (different {', '.join(said['refused'])}): refused without --overwrite")
    for phase in wanted:
        manifest = read_manifest(run.out / f"{phase}.manifest.json")
        found, text = PHASES[phase](run, None if said["refused"] else manifest)
        said[phase] = {"done": bool(manifest) and not said["refused"], **found}
        print(f"{phase}: {'done, ' if said[phase]['done'] else ''}{text}")
    return said


def _measure(run: Run, manifest: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    mine = run.mine(run.pool)
    scanned = [shard for shard in mine if store.shard_record(run.root, shard) is not None]
    units = phases.known_units(run, scanned) or []
    signal_set = phases.signal_set_of(run, units)
    missing = signal_set.missing(units)
    open_shards = {unit.shard.path for unit in missing}
    found: dict[str, Any] = {
        "shards_measured": len(scanned) - len(open_shards),
        "shards_to_measure": len(mine) - len(scanned) + len(open_shards),
        "shards_not_looked_into": len(mine) - len(scanned),
        "pairs_measured": sum(unit.rows for unit in units) - sum(unit.rows for unit in missing),
        "pairs_to_measure": sum(unit.rows for unit in missing),  # as far as their shards were looked into
        "signals": list(run.config.signals),
        "signal_set": str(signal_set.folder),
    }
    text = (
        f"{found['shards_measured']:,} of {len(mine):,} shards are measured ({found['pairs_measured']:,} pairs), "
        f"{found['shards_to_measure']:,} are to be"
    )
    if missing:
        text += f"; {found['pairs_to_measure']:,} pairs in {len(open_shards):,} of them"
    if unknown := found["shards_not_looked_into"]:
        text += f"; how many pairs {unknown:,} of them hold is not known before they are read"
    return found, f"{text}\n  {', '.join(found['signals']) or 'no signals'} in {found['signal_set']}"


def _select(run: Run, manifest: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    found: dict[str, Any] = {"selectors": list(run.config.selectors)}
    names = ", ".join(found["selectors"]) or "no selectors: whatever is readable stays"
    if manifest is None:
        return found, f"all samples by {names}"
    changed = [name for name, content in run.read.items() if manifest.get("read", {}).get(name) != content]
    found |= {"seen": manifest["seen"], "kept": manifest["kept"], "changed": changed}
    text = f"keeps {manifest['kept']:,} of {manifest['seen']:,} by {names}"
    if changed:
        text += f"; what {', '.join(changed)} reads has changed since: refused without --overwrite"
    return found, text


def _build(run: Run, manifest: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    target = run.out / "shards"
    if manifest is not None:
        return {"shards": manifest["shards"]}, f"{manifest['shards']:,} shards in {target}"
    copied = sum(1 for _ in (run.build_folder / "done").glob("*"))
    text = f"what is kept into shards of at most {run.config.shard_samples:,} samples in {target}"
    if copied:
        text += f"; {copied:,} of at most {len(run.pool):,} input shards are copied"
    return {"input_shards_copied": copied}, text


PHASES = {"measure": _measure, "select": _select, "build": _build}
