"""The vision tower of MM-GEM and of the bridges: open_clip's ViT without its projection.

A recipe names an architecture of open_clip's (with weights), the export of a
CLIP that was trained here (`arch: local-dir:RUN/export`), or sizes for a tower
from scratch. An export's sizes become the model's own, so that its checkpoints
say what they are made of.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from curation.errors import UserError
from curation.preprocess import LOCAL
from training.family_config import VisionConfig
from training.models.patches import take_over


def vision_tower(settings: dict[str, Any], weights: str | None = None) -> Any:
    """open_clip's ViT without its projection: image [B, 3, S, S] -> (_, patches [B, N, Dv])."""
    import open_clip

    visual: Any
    if settings.get("arch"):
        visual = open_clip.create_model(settings["arch"], pretrained=weights).visual
    else:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        known = {k: v for k, v in settings.items() if k in CLIPVisionCfg.__dataclass_fields__}
        visual = _build_vision_tower(embed_dim=settings["width"], vision_cfg=CLIPVisionCfg(**known))
    if getattr(visual, "attn_pool", True) is not None:
        raise UserError(f"mmgem.vision.arch: {settings['arch']} has no plain ViT of open_clip's; take a CLIP's")
    take_over(visual, settings.get("patch_dropout") or 0.0)
    visual.proj = None
    visual.output_tokens = True
    return visual


def pretrained_tower(vision: VisionConfig) -> tuple[VisionConfig, dict[str, torch.Tensor] | None]:
    """(sizes, weights) of what the recipe names; no weights for a tower from scratch.

    Raises:
        UserError: as `from_export`.
    """
    if vision.arch and vision.arch.startswith(LOCAL):
        return from_export(Path(vision.arch.removeprefix(LOCAL)), vision)
    if vision.arch and vision.pretrained:
        return vision, vision_tower(asdict(vision), vision.pretrained).state_dict()
    return vision, None


def from_export(folder: Path, vision: VisionConfig) -> tuple[VisionConfig, dict[str, torch.Tensor]]:
    """The sizes and the weights of the vision tower in an open_clip export, without its projection.

    Raises:
        UserError: no such export, or no plain ViT's.
    """
    try:
        record = json.loads((folder / "open_clip_config.json").read_text())
        sizes = record["model_cfg"]["vision_cfg"]
        tensors = load_file(folder / "open_clip_model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"mmgem.vision.arch: {LOCAL}{folder} is no export of a CLIP ({error!r})") from None
    known = {name: value for name, value in sizes.items() if name in VisionConfig.__dataclass_fields__}
    if known.keys() != sizes.keys() or not isinstance(sizes["layers"], int) or record["model_cfg"].get("quick_gelu"):
        raise UserError(f"mmgem.vision.arch: {folder} has a tower that is no plain ViT with GELU; take a CLIP's")
    weights = {n.removeprefix("visual."): x for n, x in tensors.items() if n.startswith("visual.")}
    weights.pop("proj")
    return VisionConfig(**{**known, "patch_dropout": vision.patch_dropout}), weights
