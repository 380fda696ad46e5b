"""Manifests: written last and atomically, so that their presence means complete.

A killed command leaves no manifest, a finished one leaves one that says from
which configuration it came. That gives the rule of every command: the same
configuration on a finished output does nothing, on a half-finished one it
resumes, on anything else it refuses and names `--overwrite`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from curation.errors import UserError

SCHEMA_VERSION = 1


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a unique temporary name and a rename: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as f:
        json.dump(content, f, indent=1, default=str)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with the schema version in front."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **content})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where the work is not complete."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def claim(out: Path, identity: dict[str, Any], *, overwrite: bool = False, keep: tuple[str, ...] = ()) -> None:
    """Make `out` the folder of this work, or refuse.

    `identity` is what makes two invocations the same work (configuration,
    inputs). It is stored in `out/.identity.json` when the folder is new and
    compared when it is not. `overwrite` empties the folder but for the names
    in `keep`, which are right for any work (a signal store).

    Raises:
        UserError: `out` holds other work, or files that are nobody's.
    """
    mark = out / ".identity.json"
    wanted = json.loads(json.dumps(identity, default=str))
    if overwrite and out.exists():
        if any(out.iterdir()) and not mark.exists():
            raise UserError(f"--out {out}: not made by gemsmith, so --overwrite leaves it alone; name another")
        for entry in out.iterdir():
            if entry.name in keep:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    found = read_manifest(mark)
    if found is None:
        if out.exists() and any(entry.name not in keep for entry in out.iterdir()):
            raise UserError(f"--out {out}: not empty and not of this run; name another folder or empty it")
        write_json(mark, wanted)
    elif found != wanted:
        differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        what = ", ".join(differing)
        raise UserError(f"--out {out}: holds another run (different {what}); name another folder or pass --overwrite")
