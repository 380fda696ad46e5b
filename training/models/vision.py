"""The vision tower of MM-GEM and of the bridges: open_clip's ViT without its projection.

A recipe names an architecture of open_clip's (with weights), the export of a
CLIP that was trained here (`arch: local-dir:RUN/export`), one on the hub
(`arch: hf-hub:NAME`), or sizes for a tower from scratch. The sizes of a folder
and of the hub become the model's own, so that it opens without them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from curation.errors import UserError, one_line
from curation.preprocess import HUB, LOCAL
from training.family_config import VisionConfig
from training.models.kind import check_whole, opened_clip
from training.models.patches import take_over

ARCH = "mmgem.vision.arch"


def vision_tower(settings: dict[str, Any]) -> Any:
    """open_clip's ViT without its projection: image [B, 3, S, S] -> (_, patches [B, N, Dv]), with fresh weights.

    The tower alone is built: open_clip's `create_model` would move a whole CLIP to the CPU, which fails where
    transformers opens a folder, on the meta device.

    Raises:
        UserError: open_clip knows no such architecture, or its tower is no plain ViT.
    """
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    arch = settings.get("arch")
    if arch:
        try:
            known = open_clip.get_model_config(arch if ":" in arch else arch.replace("/", "-"))
        except (OSError, RuntimeError, ValueError) as error:
            raise _unreadable(arch, error) from None
        if known is None:
            raise UserError(f"{ARCH}: open_clip knows no {arch!r}; open_clip.list_models() names them")
        if "timm_model_name" in known["vision_cfg"]:
            raise _no_vit(arch)
        sizes, width, quick = CLIPVisionCfg(**known["vision_cfg"]), known["embed_dim"], known.get("quick_gelu", False)
    else:
        own = {k: v for k, v in settings.items() if k in CLIPVisionCfg.__dataclass_fields__}
        sizes, quick = CLIPVisionCfg(**own), settings.get("quick_gelu", False)
        width = sizes.width
    return _plain(_build_vision_tower(width, sizes, quick), settings)


def _plain(visual: Any, settings: dict[str, Any]) -> Any:
    if getattr(visual, "attn_pool", True) is not None:
        raise _no_vit(settings.get("arch"))
    take_over(visual, settings.get("patch_dropout") or 0.0)
    visual.proj = None
    visual.output_tokens = True
    return visual


def _no_vit(arch: str | None) -> UserError:
    return UserError(f"{ARCH}: {arch} has no plain ViT of open_clip's; take a CLIP's")


def _unreadable(arch: str, error: Exception) -> UserError:
    return UserError(f"{ARCH}: {arch}: {one_line(error, 200)}")


def pretrained_tower(vision: VisionConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """(settings of `vision_tower`, weights) of what the recipe names; no weights for a tower from scratch.

    Raises:
        UserError: as `from_export`; no such weights, or of another activation than the architecture's.
    """
    if vision.arch is None or not (vision.pretrained or vision.arch.startswith((HUB, LOCAL))):
        return asdict(vision), None
    if vision.arch.startswith(LOCAL) and not vision.pretrained:
        return from_export(Path(vision.arch.removeprefix(LOCAL)), vision)
    weights = _plain(opened_clip(vision.arch, vision.pretrained, ARCH).visual, asdict(vision)).state_dict()
    if not vision.arch.startswith(HUB):
        return asdict(vision), weights
    import open_clip

    return _sizes(open_clip.get_model_config(vision.arch), vision), weights


def from_export(folder: Path, vision: VisionConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and the weights of the vision tower in an open_clip export, without its projection.

    Raises:
        UserError: no such export, one that is cut short, or no plain ViT's.
    """
    check_whole(folder, ARCH)
    try:
        model_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        sizes = model_cfg["vision_cfg"]
        tensors = load_file(folder / "open_clip_model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{ARCH}: {LOCAL}{folder} is no export of a CLIP ({error!r})") from None
    if not sizes.keys() <= VisionConfig.__dataclass_fields__.keys() or not isinstance(sizes["layers"], int):
        raise UserError(f"{ARCH}: {folder} has a tower that is no plain ViT; take a CLIP's")
    weights = {n.removeprefix("visual."): x for n, x in tensors.items() if n.startswith("visual.")}
    weights.pop("proj")
    return _sizes(model_cfg, vision), weights


def _sizes(model_cfg: dict[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """Settings of `vision_tower` for the tower in a model's `model_cfg`."""
    quick = bool(model_cfg.get("quick_gelu"))
    return {**model_cfg["vision_cfg"], "quick_gelu": quick, "patch_dropout": vision.patch_dropout}
