"""Manifests: written last and atomically, so that their presence means complete.

A killed command leaves no manifest, a finished one leaves one that says from
which configuration it came. That gives the rule of every command: the same
configuration on a finished output does nothing, on a half-finished one it
resumes, on anything else it refuses and names `--overwrite`. While a command is
at work there, its lock on the folder's identity keeps others out: of two that
start at the same moment both find the same half-finished work.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.files import OUT_MARK

SCHEMA_VERSION = 1
EMPTYING = {"state": "being emptied"}  # the identity of a folder whose old files are half deleted: of no work


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a unique temporary name and a rename: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w") as f:
            json.dump(content, f, indent=1, default=str)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk, which it should not help to fill
        temporary.unlink(missing_ok=True)
        raise


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
        UserError: `out` holds other work, or files that are nobody's, or is a file.
    """
    mark = out / OUT_MARK
    if file := next((path for path in (out, *out.parents) if path.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file; name a folder")
    if link := next((path for path in (out, *out.parents) if path.is_symlink() and not path.exists()), None):
        raise UserError(f"--out {out}: {link} is a link to {os.readlink(link)}, which is not there; make that folder")

    def foreign() -> bool:
        return any(entry.name not in keep and not _is_temporary(entry, mark) for entry in out.iterdir())

    if overwrite and out.exists():
        if mark.exists():
            _empty(out, mark, keep)
        elif foreign():
            raise UserError(f"--out {out}: not made by gemsmith, so --overwrite leaves it alone; name another")
    found = read_manifest(mark)
    if found is None:
        if out.exists() and foreign():
            raise UserError(f"--out {out}: not empty and not of this run; name another folder or empty it")
        write_json(mark, identity)
    elif found == EMPTYING:
        raise UserError(f"--out {out}: an --overwrite of it was cut short; pass --overwrite again")
    elif different := differing(out, identity):
        what = ", ".join(different)
        raise UserError(f"--out {out}: holds another run (different {what}); name another folder or pass --overwrite")


def occupy(out: Path, *, shared: bool = False) -> int | None:
    """Hold a claimed folder until the descriptor is closed or this process ends, however it does.

    None where it is not claimed, nothing can be written there, or its file system knows no locks. One that knows those
    of other hosts (NFS, Lustre with flock) keeps these out too.

    Args:
        shared: with others that share it, as slices do.

    Raises:
        UserError: another process holds it.
    """
    try:
        descriptor = os.open(out / OUT_MARK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"--out {out}: another gemsmith is at work there; wait for it, end it with SIGTERM, or name another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return None


@contextlib.contextmanager
def occupied(out: Path, *, shared: bool = False) -> Iterator[None]:
    """`occupy` while the body runs."""
    descriptor = occupy(out, shared=shared)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def differing(out: Path, identity: dict[str, Any]) -> list[str]:
    """What of the work that `out` holds is different from this; nothing where it holds this or none."""
    found, wanted = read_manifest(out / OUT_MARK), json.loads(json.dumps(identity, default=str))
    return sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k)) if found else []


def _empty(out: Path, mark: Path, keep: tuple[str, ...]) -> None:
    """Delete manifests, then data, then the identity: what a kill leaves neither looks complete nor resumes."""
    write_json(mark, EMPTYING)
    manifests = [path for path in out.rglob("*manifest.json") if path.relative_to(out).parts[0] not in keep]
    for path in sorted(manifests, key=lambda path: (path != out / "manifest.json", path)):
        path.unlink()
    for entry in out.iterdir():
        if entry.name not in keep and entry != mark:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    mark.unlink()


def _is_temporary(entry: Path, mark: Path) -> bool:
    """Whether this is what a `write_json` of the mark leaves when it is killed."""
    return entry.name.startswith(f".{mark.name}.") and entry.name.endswith(".tmp")
