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

from curation.errors import UserError, one_line
from curation.preprocess import HUB, LOCAL
from training.config import ObjectiveConfig
from training.family_config import ClipRecipe
from training.models.kind import opened_clip
from training.models.patches import only, take_over
from training.models.scalars import START, add_scalars, read_scalars

SCALARS = {"log_scale": "logit_scale", "logit_bias": "logit_bias"}
"""Our names and open_clip's."""
BEGIN = {"log_scale": "init_logit_scale", "logit_bias": "init_logit_bias"}
"""Where open_clip's configs say that they begin."""


def plain(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What open_clip's classes are built with from scratch: no class, no scalars, no weights from elsewhere for a
    picture tower, and no dropping of patches, which is ours (training/models/patches.py)."""
    vision = {**model_cfg["vision_cfg"], "timm_model_pretrained": False, "patch_dropout": 0.0}
    return {k: v for k, v in model_cfg.items() if k not in ("custom_text", *BEGIN.values())} | {"vision_cfg": vision}


class Clip(nn.Module):
    """open_clip's two towers, and the scalars of the coupled loss."""

    separable: tuple[str, ...] = ()
    blocks = frozenset({"ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block"})  # the last is timm's

    def __init__(self, model_cfg: dict[str, Any], objective: ObjectiveConfig, pretrained: Any = None) -> None:
        """pretrained: open_clip's model of this kind with weights, which becomes the towers; None: from scratch."""
        super().__init__()
        own = {ours: model_cfg[name] for ours, name in BEGIN.items() if model_cfg.get(name) is not None}
        self.towers = self._built(model_cfg) if pretrained is None else pretrained
        if pretrained is not None:
            ended = {ours: getattr(pretrained, theirs, None) for ours, theirs in SCALARS.items()}
            own |= {name: float(scalar.detach()) for name, scalar in ended.items() if scalar is not None}
            self.towers.logit_bias = None
        del self.towers.logit_scale
        self.patch_dropout = float(model_cfg["vision_cfg"].get("patch_dropout", 0.0))
        take_over(self.towers.visual, self.patch_dropout)
        self.scalars = add_scalars(self, objective, own)
        self.model_cfg = {name: value for name, value in model_cfg.items() if name != "init_logit_bias"}
        # Who takes the model away sees all patches: open_clip would drop them wherever it is in training mode.
        self.model_cfg["vision_cfg"] = {k: v for k, v in model_cfg["vision_cfg"].items() if k != "patch_dropout"}
        if "logit_bias" in self.scalars:  # open_clip has one where its config does
            self.model_cfg["init_logit_bias"] = model_cfg.get("init_logit_bias") or START["siglip"]["logit_bias"]

    @classmethod
    def _built(cls, model_cfg: dict[str, Any]) -> Any:
        """
        Raises:
            UserError: open_clip's classes do not take it; their words name the key.
        """
        try:
            return cls._towers(model_cfg)
        except (TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
            raise UserError(
                f"clip.model_cfg: open_clip cannot build it ({one_line(repr(error), 200)}); mend the key"
            ) from None

    @staticmethod
    def _towers(model_cfg: dict[str, Any]) -> Any:
        from open_clip.model import CLIP, CustomTextCLIP

        custom = model_cfg.get("custom_text") or "hf_model_name" in model_cfg["text_cfg"]
        return (CustomTextCLIP if custom else CLIP)(**plain(model_cfg))

    @staticmethod
    def from_recipe(recipe: ClipRecipe, objective: ObjectiveConfig) -> "Clip":
        """The recipe's architecture: CoCa where it has a text decoder.

        Raises:
            UserError: no such architecture or weights, weights of another activation, or a captioning loss without a
                decoder.
        """
        import open_clip

        from training.models.coca import Coca

        if (recipe.arch is None) == (recipe.model_cfg is None):
            raise UserError("clip: exactly one of `arch` (an open_clip name) and `model_cfg` is needed")
        model_cfg, pretrained = recipe.model_cfg, None
        if recipe.arch is not None:
            name = recipe.arch if ":" in recipe.arch else recipe.arch.replace("/", "-")
            try:
                model_cfg = open_clip.get_model_config(name)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"clip.arch: {recipe.arch}: {one_line(error, 200)}") from None
            if recipe.pretrained or recipe.arch.startswith((HUB, LOCAL)):
                pretrained = opened_clip(recipe.arch, recipe.pretrained, "clip.arch")
        if model_cfg is None:
            raise UserError(f"clip.arch: open_clip knows no {recipe.arch!r}; open_clip.list_models() names them")
        if recipe.patch_dropout is not None:
            vision = {**model_cfg["vision_cfg"], "patch_dropout": recipe.patch_dropout}
            model_cfg = {**model_cfg, "vision_cfg": vision}
        if "multimodal_cfg" in model_cfg:
            if model_cfg["text_cfg"].get("hf_tokenizer_name"):
                raise UserError("clip.arch: a CoCa writes by open_clip's own tokenizer alone; take coca_ViT-*")
            return Coca(model_cfg, objective, pretrained)
        if "generate" in objective.weights:
            raise UserError("objective.weights: generate needs an architecture with a text decoder (coca_*); remove it")
        return Clip(model_cfg, objective, pretrained)

    def checkpoint_activations(self) -> None:
        """Keep the blocks' inputs alone, and compute the rest again in the backward pass."""
        self.towers.set_grad_checkpointing()

    def image(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """[B, 3, S, S] -> embeddings [B, D], and what a decoder looks at."""
        return self.towers.visual(pixel_values), None

    def text(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """[B, T] -> embeddings [B, D], and what a decoder goes on from."""
        return self.towers.encode_text(input_ids), None

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk of pairs: pixel_values [c, 3, S, S] · input_ids [c, T] as open_clip's tokenizer gives them ·
        negative.input_ids [c, m - 1, T] hard negatives of each row, none without it ·
        patches [c, keep] that are seen, all without it."""
        return self._both(chunk)[0]

    def _both(self, chunk: Any) -> tuple[dict[str, Any], Any, Any]:
        """(outputs without sums, the decoder's picture, the decoder's captions) of a chunk."""
        ids = chunk["input_ids"]
        if "negative.input_ids" in chunk:  # all texts in one pass: under ZeRO-3 a block runs once before its backward
            ids = torch.cat([ids[:, None], chunk["negative.input_ids"]], 1)  # [c, m, T]
        pixels = chunk["pixel_values"].to(next(self.towers.visual.parameters()).dtype)
        with only(self.towers.visual, chunk.get("patches")):
            image, picture = self.image(pixels)
        text, words = self.text(ids.flatten(0, -2))
        left, right = (F.normalize(side.float(), dim=-1) for side in (image, text))
        if ids.ndim == 3:
            right = right.unflatten(0, ids.shape[:2])  # [c, m, D]
            words = None if words is None else words.unflatten(0, ids.shape[:2])[:, 0]
        return {"left": left, "right": right, "scalars": read_scalars(self)}, picture, words

    @staticmethod
    def counts(chunk: Any) -> dict[str, float]:
        return {}

    def to_open_clip(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state of this model by open_clip's names."""
        tensors = {k.removeprefix("towers."): v.contiguous() for k, v in state.items() if k.startswith("towers.")}
        return tensors | {theirs: state[ours].reshape(()) for ours, theirs in SCALARS.items() if ours in state}

    def from_open_clip(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state that `to_open_clip` was given."""
        tensors = dict(tensors)
        scalars = {ours: tensors.pop(theirs).reshape(1) for ours, theirs in SCALARS.items() if theirs in tensors}
        return {**scalars, **{f"towers.{name}": tensor for name, tensor in tensors.items()}}


def export(model: Clip, state: dict[str, torch.Tensor], preprocess: dict[str, Any], folder: Path) -> None:
    """Write open_clip's folder layout: open_clip_config.json and open_clip_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.to_open_clip(state), folder / "open_clip_model.safetensors")
    config = {"model_cfg": model.model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))


def read_export(model: Clip, folder: Path) -> dict[str, torch.Tensor]:
    """The state that `export` was given."""
    return model.from_open_clip(load_file(folder / "open_clip_model.safetensors"))
