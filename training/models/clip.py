"""CLIP kin through open_clip: any of its architectures, trained by our step, exported as its own checkpoint.

The exported folder opens with `open_clip.create_model_and_transforms("local-dir:RUN/export")`,
so a scorer trained here is used by curation like any published one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from curation.errors import UserError
from training.config import ObjectiveConfig
from training.family_config import ClipRecipe
from training.models.patches import only, take_over
from training.models.scalars import add_scalars, read_scalars

SCALARS = {"log_scale": "logit_scale", "logit_bias": "logit_bias"}
"""Our names and open_clip's."""


class Clip(nn.Module):
    """open_clip's two towers, and the scalars of the coupled loss."""

    separable = ()
    blocks = frozenset({"ResidualAttentionBlock"})

    def __init__(self, model_cfg: dict[str, Any], objective: ObjectiveConfig, pretrained: Any = None) -> None:
        super().__init__()
        from open_clip.model import CLIP

        self.model_cfg = model_cfg
        self.towers = CLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
        if pretrained is not None:
            self.towers.load_state_dict(pretrained)
        self.patch_dropout = float(model_cfg["vision_cfg"].get("patch_dropout", 0.0))
        take_over(self.towers.visual, self.patch_dropout)
        del self.towers.logit_scale
        self.scalars = add_scalars(self, objective)

    @classmethod
    def from_recipe(cls, recipe: ClipRecipe, objective: ObjectiveConfig) -> "Clip":
        import open_clip

        if (recipe.arch is None) == (recipe.model_cfg is None):
            raise UserError("clip: exactly one of `arch` (an open_clip name) and `model_cfg` is needed")
        if recipe.model_cfg is not None:
            return cls(recipe.model_cfg, objective)
        assert recipe.arch is not None
        model_cfg = open_clip.get_model_config(recipe.arch)
        if model_cfg is None:
            raise UserError(f"clip.arch: open_clip knows no {recipe.arch!r}; open_clip.list_models() names them")
        weights = open_clip.create_model(recipe.arch, recipe.pretrained).state_dict() if recipe.pretrained else None
        return cls(model_cfg, objective, weights)

    def checkpoint_activations(self) -> None:
        """Keep the blocks' inputs alone, and compute the rest again in the backward pass."""
        self.towers.set_grad_checkpointing()

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk of pairs: pixel_values [B, 3, S, S] · input_ids [B, T] as open_clip's tokenizer gives them ·
        patches [B, keep] that are seen, all without it."""
        pixels = chunk["pixel_values"].to(next(self.towers.visual.parameters()).dtype)
        with only(self.towers.visual, chunk.get("patches")):
            image = self.towers.encode_image(pixels)
        text = self.towers.encode_text(chunk["input_ids"])
        left, right = (F.normalize(side.float(), dim=-1) for side in (image, text))
        return {"left": left, "right": right, "scalars": read_scalars(self)}

    @staticmethod
    def counts(chunk: Any) -> dict[str, float]:
        return {}


def export(model: Clip, state: dict[str, torch.Tensor], preprocess: dict[str, Any], folder: Path) -> None:
    """Write open_clip's folder layout: open_clip_config.json and open_clip_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k.removeprefix("towers."): v.contiguous() for k, v in state.items() if k.startswith("towers.")}
    for ours, theirs in SCALARS.items():
        if ours in state:
            tensors[theirs] = state[ours].reshape(())
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model.model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))


def read_export(folder: Path) -> dict[str, torch.Tensor]:
    """The state that `export` was given."""
    tensors = load_file(folder / "open_clip_model.safetensors")
    scalars = {ours: tensors.pop(theirs).reshape(1) for ours, theirs in SCALARS.items() if theirs in tensors}
    return {**scalars, **{f"towers.{name}": tensor for name, tensor in tensors.items()}}
