"""A checkpoint as a folder that others open: weights in one piece, configuration and tokenizer, without a GPU.

    gemsmith export --checkpoint RUN/checkpoints/step_00000500 --out DIR --dtype bf16

`gemsmith train` writes RUN/export the same way when it ends; this is for other steps and for other precisions. What the
folder holds is the family's choice: `save_pretrained` of transformers, open_clip's layout, or an adapter alone.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from curation.errors import UserError
from curation.manifest import claim, read_manifest, write_json, write_manifest
from training import checkpoint
from training.families import Family
from training.inference import config_from, rebuild

Dtype = Literal["fp32", "bf16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARK = "gemsmith.json"
"""Written last: the step and the recipe, so that an export can be graded wherever it is taken."""


def export(folder: Path, out: Path, dtype: Dtype = "fp32", *, overwrite: bool = False) -> None:
    """Write the weights of the checkpoint in `folder` to `out`; a finished export of them is left as it is.

    Raises:
        UserError: not a whole checkpoint, or `out` holds something else.
    """
    if (folder / MARK).exists():
        raise UserError(f"--checkpoint {folder}: is an export already; name the RUN/checkpoints/step_* it came from")
    manifest = checkpoint.check(folder)
    claim(out, {"weights": manifest["weights_hash"], "dtype": dtype}, overwrite=overwrite)
    if read_manifest(out / MARK) is not None:
        print(f"{out} is already complete: step {manifest['step']} in {dtype}")
        return
    config = config_from(manifest["config"])
    family = rebuild(config, folder.parent.parent / "tokenizer")
    facts = {"steps": manifest["step"], "samples": manifest["samples"], "config": manifest["config"]}
    write(family, folder, out, facts, dtype)
    print(f"{out}: step {manifest['step']} in {dtype}")


def write(family: Family, folder: Path, out: Path, facts: dict[str, Any], dtype: Dtype = "fp32") -> None:
    """The checkpoint's weights as the family exports them, in `dtype`; `facts` last."""
    family.export(checkpoint.consolidated(folder), out)
    if dtype != "fp32":
        cast(out, TYPES[dtype])
    write_manifest(out / MARK, facts)


def cast(out: Path, dtype: torch.dtype) -> None:
    """Rewrite every safetensors file of a folder in `dtype`, and say so in its config.json; integers stay."""
    from safetensors.torch import load_file, save_file

    total = 0
    for file in sorted(out.glob("*.safetensors")):
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
        total += sum(x.nbytes for x in tensors.values())
        save_file(tensors, file, metadata={"format": "pt"})
    if (config := out / "config.json").exists():
        write_json(config, {**json.loads(config.read_text()), "dtype": str(dtype).removeprefix("torch.")})
    if (index := out / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = total
        write_json(index, content)
