"""Which checkpoint a run goes on from, and whether it can: the same one on every rank.

Rank 0 finds the last complete one. On a file system that hosts share, another
host may not see it for a while yet (NFS: `acdirmax`); a rank that took its own
last one would load other steps than the rest, and ZeRO would put a mixture
together. So the others wait until they see rank 0's, or all end in one line.
"""

import json
import time
from collections.abc import Iterator
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
    folder, until = checkpoint.step_folder(run, step), time.monotonic() + checkpoint.APPEARS_S
    while not (seen := _seen(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    if world.any(not seen):
        raise UserError(
            f"--out {folder}: rank 0 resumes from it, and {'another rank' if seen else f'rank {world.rank}'} does not "
            f"see all of it within {checkpoint.APPEARS_S:g} s; put --out on a disk that all hosts share"
        )
    return folder


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
