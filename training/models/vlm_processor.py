"""The processor of a vision-language backbone: made for one from scratch, or opened and changed as the recipe says.

transformers leaves out what it does not know, and lets some settings of a
folder win over those that are asked for, without a word: a limit that is
misspelt would be none. So each is looked for where it should be afterwards.
"""

from collections.abc import Mapping
from typing import Any

from curation.errors import UserError
from training.models.kind import OF_HUB

OF_CALLS = ("data_format", "device", "disable_grouping", "input_data_format", "return_tensors")
"""Settings of a call, which a processor only passes on."""
PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""What Qwen's image processors keep these as, in their `size`."""


def check_settings(processor: Any, settings: Mapping[str, Any]) -> None:
    """
    Args:
        processor: opened with these settings.

    Raises:
        UserError: one that it does not know, or that another wins over.
    """
    images, name = getattr(processor, "image_processor", None), type(processor).__name__
    known = set(getattr(getattr(images, "valid_kwargs", None), "__annotations__", ())) - set(OF_CALLS)
    size = getattr(images, "size", None)
    for setting, asked in settings.items():
        field = f"vlm2vec.processor_settings.{setting}"
        if setting in OF_HUB:
            continue
        if setting in PIXELS and setting in known:
            found = [dict(size or {}).get(setting, dict(size or {}).get(PIXELS[setting]))]
        else:
            found = [
                getattr(part, setting, None) for part in (images, processor, getattr(processor, "tokenizer", None))
            ]
        found = [value for value in found if value is not None]
        if not found:
            said = f"; it has {', '.join(sorted(known))}" if known else ""
            raise UserError(f"{field}: {name} has no such setting and would leave it out{said}")
        if not any(_holds(value, asked) for value in found):
            instead = f"; write {' and '.join(PIXELS)}" if setting == "size" and known >= PIXELS.keys() else ""
            raise UserError(f"{field}: stays {found[0]}, since what lies beside it in the folder wins{instead}")


def _holds(found: Any, asked: Any) -> bool:
    if isinstance(asked, Mapping):
        return not isinstance(found, int | float | str) and dict(found).items() >= asked.items()
    if hasattr(found, "get"):  # a size, of which one number makes a side
        return asked in dict(found).values()
    return list(found) == list(asked) if isinstance(found, list | tuple) else found == asked


def build_processor(config: Any, tokenizer: Any) -> Any:
    """A processor for a backbone from scratch, of the sizes in its config.

    Raises:
        UserError: a kind of backbone whose processor is not known here.
    """
    import transformers

    vision = config.vision_config
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        side = vision.patch_size * vision.spatial_merge_size
        images: Any = transformers.Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": side * side, "longest_edge": 64 * side * side},
        )
        plain = config.model_type == "qwen2_vl"
        kind: Any = transformers.Qwen2VLProcessor if plain else transformers.Qwen2_5_VLProcessor
        return kind(images, tokenizer, transformers.Qwen2VLVideoProcessor())
    if config.model_type == "llava_next":
        tile = {"height": vision.image_size, "width": vision.image_size}
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": vision.image_size},
            crop_size=tile,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
        return transformers.LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
    raise UserError(
        f"vlm2vec.backbone: no processor for {config.model_type!r} is built here; name one by vlm2vec.processor"
    )


QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL = {
    "qwen2_vl": QWEN_TOKENS,
    "qwen2_5_vl": QWEN_TOKENS,
    "llava_next": ["<image>"],
}
"""Tokens that a tokenizer trained here adds for a backbone from scratch."""


def build_tokenizer(captions: list[str], vocab_size: int, model_type: str) -> Any:
    """The byte-level BPE of `training.tokenizer`, with the backbone's image tokens."""
    from training.tokenizer import train_bpe

    tokenizer = train_bpe(captions, vocab_size)
    tokenizer.add_tokens(SPECIAL.get(model_type, []), special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer
