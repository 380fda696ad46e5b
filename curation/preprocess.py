"""How a CLIP wants to see its pictures: open_clip's `preprocess_cfg` of a model, for scoring, training and grading.

open_clip knows it of weights by tag, and of a folder in its own layout. Of weights in a file, and of an architecture
that is yet to be trained, it takes OpenAI's, even for SigLIP, which was never trained on those. Here such have what all
published weights of the architecture agree on, and OpenAI's only where these differ.
"""

import json
from pathlib import Path
from typing import Any

from curation.errors import UserError

LOCAL, HUB = "local-dir:", "hf-hub:"
NAMES = ("mean", "std", "interpolation", "resize_mode")


def preprocess_of(arch: str, pretrained: str | None) -> dict[str, Any]:
    """{mean, std, interpolation, resize_mode} of an architecture by name, local-dir:FOLDER or hf-hub:NAME.

    Args:
        pretrained: a tag of open_clip's, a file of weights, or None.

    Raises:
        UserError: no such folder in open_clip's layout.
    """
    from open_clip.factory import _get_hf_config
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    if arch.startswith(LOCAL):
        file = Path(arch.removeprefix(LOCAL)) / "open_clip_config.json"
        try:
            return _complete(json.loads(file.read_text()).get("preprocess_cfg") or {})
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{arch}: cannot be read ({error}); name a folder with open_clip_config.json") from None
    if arch.startswith(HUB):
        return _complete(_get_hf_config(arch.removeprefix(HUB)).get("preprocess_cfg") or {})
    name = arch.replace("/", "-")
    if found := get_pretrained_cfg(name, pretrained or ""):
        return _complete(found)
    published = [_complete(get_pretrained_cfg(name, tag)) for tag in list_pretrained_tags_by_model(name)]
    agreed = published and all(one == published[0] for one in published)
    return published[0] if agreed else _complete({})


def check_activation(arch: str, pretrained: str | None, field: str) -> None:
    """
    Args:
        field: begins the line of the error.

    Raises:
        UserError: published weights that were trained with QuickGELU, for an architecture without it. open_clip would
            only warn, and the model would be one that no paper means.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name = arch.replace("/", "-")
    tag = get_pretrained_cfg(name, pretrained or "")
    if tag.get("quick_gelu", False) and not (open_clip.get_model_config(name) or {}).get("quick_gelu", False):
        raise UserError(
            f"{field}: pretrained={pretrained} was trained with QuickGELU, which {arch} lacks; name {arch}-quickgelu"
        )


def _complete(known: dict[str, Any]) -> dict[str, Any]:
    """open_clip's defaults where nothing else is said; sequences as lists, as JSON has them."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), known)
    return {name: list(merged[name]) if name in ("mean", "std") else merged[name] for name in NAMES}
