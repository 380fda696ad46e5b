"""Which checkpoint a run goes on from, and whether it can: the same one on every rank.

Rank 0 finds the last complete one. On a file system that hosts share, another
host may not see it for a while yet (NFS: `acdirmax`); a rank that took its own
last one would load other steps than the rest, and ZeRO would put a mixture
together. So the others wait until they see rank 0's, or all end in one line. So
they do for what rank 0 makes of the data where a run begins: its tokenizer, its
codebook. Who did not see it yet would make one too, and meet the first in place.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from curation.errors import UserError
from training import checkpoint
from training.distributed import World
from training.family_config import LOSSES

GOES_ON = ("retain", "health", "budget", "holes")
"""What the loop adds to a manifest and a resumed run goes on from; checkpoints saved before it did lack some."""


def agreed(run: Path, world: World) -> Path | None:
    """The last complete checkpoint as rank 0 sees it, once every rank sees all of it; None where there is none.

    Raises:
        UserError: (on every rank) one does not see it within `checkpoint.APPEARS_S`.
    """
    last = checkpoint.latest(run) if world.rank == 0 else None
    step = int(world.max(torch.tensor([-1 if last is None else int(last.name.removeprefix("step_"))])).item())
    if step < 0:
        return None
    folder = checkpoint.step_folder(run, step)
    _together(world, lambda: _seen(folder), f"--out {folder}: rank 0 resumes from it")
    return folder


def await_made(run: Path, names: Sequence[str], world: World) -> None:
    """Return once every rank sees all the files of these folders of RUN that rank 0 sees. A collective.

    Raises:
        UserError: (on every rank) one does not within `checkpoint.APPEARS_S`.
    """
    made = world.told(_sizes(run, names))

    def seen() -> bool:
        return made.items() <= _sizes(run, names).items()

    _together(world, seen, f"--out {run}: rank 0 has made {', '.join(names)} there")


def _sizes(run: Path, names: Sequence[str]) -> dict[str, int]:
    """Bytes of each file."""
    found: dict[str, int] = {}
    for name in names:
        with suppress(OSError):  # not seen yet
            found |= {str(f.relative_to(run)): f.stat().st_size for f in (run / name).rglob("*") if f.is_file()}
    return found


def _together(world: World, seen: Callable[[], bool], what: str) -> None:
    """Wait until all ranks see it, or all end."""
    until = time.monotonic() + checkpoint.APPEARS_S
    while not (mine := seen()) and time.monotonic() < until:
        time.sleep(0.1)
    if world.any(not mine):
        raise UserError(
            f"{what}, and {'another rank' if mine else f'rank {world.rank}'} does not see all of it within "
            f"{checkpoint.APPEARS_S:g} s; put --out on a disk that all hosts share"
        )


def _seen(folder: Path) -> bool:
    """Whether all of this checkpoint is seen here."""
    try:
        checkpoint.check(folder)
    except UserError:
        return False
    return True


def check_resumable(folder: Path, recipe: dict[str, Any]) -> None:
    """
    Args:
        recipe: of the run that would go on from it.

    Raises:
        UserError: it is cut short, of another model, or saved by a gemsmith that kept less.
    """
    try:
        manifest = checkpoint.check(folder)
    except UserError as error:
        raise UserError(f"{error}: delete that folder and the run resumes from the one before") from None
    if lacking := [name for name in GOES_ON if name not in manifest]:
        raise UserError(
            f"--out {folder}: its manifest.json has no {' and no '.join(lacking)}, so an older gemsmith saved it; "
            "resume with that one, or `gemsmith export` it and begin anew with --overwrite"
        )
    theirs = manifest["config"]
    ours = json.loads(json.dumps(recipe, default=str))
    for section in (*LOSSES, "adapter"):
        if ours[section] != theirs[section]:
            name = next(_differing(section, ours[section], theirs[section]))
            raise UserError(
                f"--out {folder}: is a checkpoint of another model, whose recipe has another {name}; "
                "delete that folder, or resume with the recipe that it was trained with"
            )


def _differing(name: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Dotted names of what differs."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        yield name
        return
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            yield from _differing(f"{name}.{key}", ours.get(key), theirs.get(key))
