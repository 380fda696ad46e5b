"""A checkpoint as a folder that others open: weights in one piece, configuration and processor, without a GPU.

    gemsmith export --checkpoint RUN/checkpoints/step_00000500 --out DIR --dtype bf16

`gemsmith train` writes RUN/export the same way when it ends; this is for other steps and for other precisions. What the
folder holds is the family's choice: `save_pretrained` of transformers, open_clip's layout, or an adapter alone (with
`--merge`, the whole model with the adapter in its weights, too).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from curation.errors import UserError, full_disk_named
from curation.manifest import claim, differing, read_manifest, write_json, write_manifest
from training import checkpoint
from training.config import TrainConfig, as_dict
from training.families import Family
from training.inference import config_from, rebuild, trusting
from training.models.clip_export import OPEN_CLIP, describe
from training.processor import processor_of

Dtype = Literal["fp32", "bf16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARK = "gemsmith.json"
"""Written last: the step and the recipe, so that an export can be graded wherever it is taken."""


def export(
    folder: Path,
    out: Path,
    dtype: Dtype = "fp32",
    *,
    merge: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the weights of the checkpoint in `folder` to `out`; a finished export of them is left as it is.

    overwrite: discard what `out` holds; a finished export of other weights only once this one is whole ·
    trust_remote_code: as `training.inference.load` has it.

    Raises:
        UserError: not a whole checkpoint, or `out` holds something else; nothing to merge; code that is not trusted;
            no room.
    """
    if (folder / MARK).exists():
        raise UserError(f"--checkpoint {folder}: is an export already; name the RUN/checkpoints/step_* it came from")
    manifest = checkpoint.check(folder)
    config = config_from(manifest["config"])
    if merge:
        if config.adapter is None:
            raise UserError(f"--merge: {folder} has no adapter; leave it out")
        config = replace(config, adapter=replace(config.adapter, merge=True))
    identity = {"weights": manifest["weights_hash"], "dtype": dtype} | ({"merge": True} if merge else {})
    with full_disk_named(out):
        _export(folder, out, manifest, trusting(config, trust_remote_code), dtype, identity, overwrite)


def _export(
    folder: Path,
    out: Path,
    manifest: dict[str, Any],
    config: TrainConfig,
    dtype: Dtype,
    identity: dict[str, Any],
    overwrite: bool,
) -> None:
    place = out
    if overwrite and differing(out, identity) and read_manifest(out / MARK) is not None:
        place = out.resolve().with_name(f".{out.resolve().name}.new")  # what is there stays until this is whole
    claim(place, identity, overwrite=overwrite)
    if read_manifest(place / MARK) is not None:
        print(f"{out} is already complete: step {manifest['step']} in {dtype}")
        return
    family = rebuild(config, folder.parent.parent / "tokenizer", manifest.get("made_of"))
    facts = {"steps": manifest["step"], "samples": manifest["samples"], "config": as_dict(config)}
    write(family, folder, place, facts, dtype)
    if place != out:
        claim(out, identity, overwrite=True)
        for file in sorted(place.iterdir(), key=lambda file: file.name == MARK):  # the mark last
            file.rename(out / file.name)
        place.rmdir()
    print(f"{out}: step {manifest['step']} in {dtype}")


def write(family: Family, folder: Path, out: Path, facts: dict[str, Any], dtype: Dtype = "fp32") -> None:
    """The checkpoint's weights as the family exports them, in `dtype`; `facts` last."""
    save(config_from(facts["config"]), family, checkpoint.consolidated(folder), out)
    if dtype != "fp32":
        cast(out, TYPES[dtype])
    write_manifest(out / MARK, facts)


def save(config: TrainConfig, family: Family, state: dict[str, torch.Tensor], out: Path) -> None:
    """The weights and the processor beside them: what training/auto.py opens, where it is no adapter alone."""
    family.export(state, out)
    processor_of(config, family).save_pretrained(str(out))
    if (out / OPEN_CLIP).exists():
        describe(out)


def cast(out: Path, dtype: torch.dtype) -> None:
    """Rewrite every safetensors file of a folder in `dtype`, and say so in its config.json; integers stay."""
    from safetensors.torch import load_file, save_file

    total = 0
    for file in sorted(out.rglob("*.safetensors")):
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
        total += sum(x.nbytes for x in tensors.values()) if file.parent == out else 0
        save_file(tensors, file, metadata={"format": "pt"})
    if (config := out / "config.json").exists():
        write_json(config, {**json.loads(config.read_text()), "dtype": str(dtype).removeprefix("torch.")})
    if (index := out / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = total
        write_json(index, content)
