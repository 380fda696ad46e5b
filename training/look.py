"""How a recipe's model sees its pictures: as its vision tower was trained to, where that has weights."""

from typing import Any

from curation.errors import UserError
from curation.preprocess import LOCAL, preprocess_of
from training.data.images import HOW


def look_of(arch: str | None, pretrained: str | None, resize_mode: str | None, field: str) -> dict[str, Any]:
    """{mean, std, interpolation, resize_mode}, as `ImageSpec` has them.

    Args:
        arch: an architecture of open_clip's, local-dir:FOLDER, or None for sizes from scratch.
        resize_mode: what the recipe says, or None.
        field: that names the architecture.

    Raises:
        UserError: a way of seeing that is not built in, or another than that of a model that was trained here.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    if arch is None:
        found = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
        return {**found, "resize_mode": resize_mode or "squash"}
    found = preprocess_of(arch, pretrained)
    own = found["resize_mode"]
    if arch.startswith(LOCAL) and resize_mode not in (None, own):
        raise UserError(f"loader.resize_mode: {arch.removeprefix(LOCAL)} was trained with {own}; write that")
    found |= {"mean": tuple(found["mean"]), "std": tuple(found["std"]), "resize_mode": resize_mode or own}
    if found["resize_mode"] == "longest":
        raise UserError(f"{field}: {arch} sees pictures with bars at their sides; write loader.resize_mode: squash")
    if found["interpolation"] not in HOW:
        raise UserError(f"{field}: {arch} wants {found['interpolation']} interpolation; here are {', '.join(HOW)}")
    return found
