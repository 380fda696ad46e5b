"""Checkpoints: sharded as the ranks hold them, complete only with a manifest, checked before they are trusted.

    RUN/checkpoints/step_00000100/       DeepSpeed's files of every rank
                                  manifest.json   written last: step, samples, recipe, every file's size,
                                                  and the weights' hash that evaluation caches by

The position in the data, the learning rate and the random state are functions
of the step, so a checkpoint holds weights and optimiser moments, and no more.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from curation.errors import UserError
from curation.hashing import file_hash
from curation.manifest import read_manifest, write_manifest
from training.distributed import World


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(m.parent for m in (run / "checkpoints").glob("step_*/manifest.json"))


def save(engine: Any, run: Path, step: int, facts: dict[str, Any], keep_last: int) -> None:
    """Write the checkpoint of `step`, its manifest last; then drop all but the last `keep_last`."""
    world, folder = World.current(), step_folder(run, step)
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # the remains of a save that was cut short
    world.barrier()
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    world.barrier()
    if world.rank == 0:
        files = sorted(f for f in folder.rglob("*.pt"))
        write_manifest(
            folder / "manifest.json",
            {
                "step": step,
                "world_size": world.size,
                "weights_hash": file_hash(files),
                "files": {str(f.relative_to(folder)): f.stat().st_size for f in files},
                **facts,
            },
        )
        for old in complete(run)[:-keep_last]:
            (old / "manifest.json").unlink()  # first, so that no reader takes the rest for complete
            shutil.rmtree(old)
    world.barrier()


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there.

    Raises:
        UserError: no such folder, no manifest, or a file missing or cut short.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: no such folder; name a RUN/checkpoints/step_* or an export")
    manifest = read_manifest(folder / "manifest.json")
    if manifest is None:
        raise UserError(f"--checkpoint {folder}: has no manifest.json, so it was cut short; take an earlier one")
    if "files" not in manifest:
        raise UserError(f"--checkpoint {folder}: is no checkpoint; name a RUN/checkpoints/step_* or an export")
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise UserError(f"--checkpoint {folder}: {name} has {found} bytes of {size}; take another checkpoint")
    return manifest


def latest(run: Path) -> Path | None:
    found = complete(run)
    return found[-1] if found else None


def check_resumable(folder: Path, world_size: int) -> dict[str, Any]:
    """The manifest of a whole checkpoint of as many ranks.

    Raises:
        UserError: it is cut short, or was written by another number of ranks.
    """
    try:
        manifest = check(folder)
    except UserError as error:
        raise UserError(f"{error}: delete that folder and the run resumes from the one before") from None
    if manifest["world_size"] != world_size:
        raise UserError(
            f"--ranks {world_size}: {folder} was written by {manifest['world_size']} ranks; resume with as many"
        )
    return manifest


def resume(engine: Any, folder: Path) -> int:
    """Load a checkpoint into the engine; the step that it was saved after."""
    manifest = check_resumable(folder, World.current().size)
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    return manifest["step"]


def consolidated(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a sharded checkpoint, on the CPU, by parameter name."""
    manifest = check(folder)
    if manifest["zero_stage"] == 0:
        return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: tensor.clone() for name, tensor in state.items()}
