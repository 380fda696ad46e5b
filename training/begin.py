"""A run of MM-GEM that begins from another's checkpoint (`mmgem.init`), and takes over what that one is made of.

The recipe is completed before anything is launched, so that the run's
config.yaml and manifests say all of it, and its model is made of what the first
run's is made of: the backbones that one began from are not asked for. What
embeds whole pictures and texts must be the first run's: sizes, tokenizer, the
way pictures are resized, the length that texts are cut to.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.manifest import read_manifest
from training.config import TrainConfig
from training.family_config import MMGemRecipe, TokenizerConfig

TAKEN = ("vision", "language", "tokenizer", "embed_dim")


def _record(folder: Path) -> tuple[dict[str, Any], Path, dict[str, Any] | None]:
    """(recipe, tokenizer's folder, what the model is made of) of an export or a checkpoint; None of one that was saved
    before checkpoints said it."""
    from training import checkpoint
    from training.inference import export_made_of

    if (exported := read_manifest(folder / "gemsmith.json")) is not None:
        return exported["config"], folder, export_made_of(folder)
    try:
        manifest = checkpoint.check(folder)
        return manifest["config"], folder.resolve().parent.parent / "tokenizer", manifest.get("made_of")
    except UserError as error:
        raise UserError(f"mmgem.init: {str(error).removeprefix('--checkpoint ')}") from None


def resolved(config: TrainConfig) -> TrainConfig:
    """The recipe with what it takes from `mmgem.init`; one without is returned as it is.

    Raises:
        UserError: no checkpoint there, one of another family or with an adapter, or a recipe that contradicts it.
    """
    if config.mmgem is None or config.mmgem.init is None:
        return config
    from training.inference import config_from
    from training.look import look_of

    recipe, init = config.mmgem, config.mmgem.init
    record, tokenizer, model = _record(Path(init))
    first = config_from(record)
    if first.mmgem is None:
        raise UserError(f"mmgem.init: {init} is a checkpoint of {first.family}; name one of mmgem")
    if first.mmgem.mapping is not None:
        raise UserError(f"mmgem.init: {init} is a mapping between backbones, which embeds nothing; name one of mmgem")
    if first.adapter is not None and not (first.adapter.merge and tokenizer == Path(init)):
        raise UserError(f"mmgem.init: {init} keeps its weights in an adapter; name an export made with --merge")
    if recipe.stage2 is None and (first.mmgem.prompts or first.mmgem.h4):
        raise UserError(f"mmgem.stage2: {init} has been through stage 2; write captioning or retrieval")
    vision = first.mmgem.vision
    look = model or look_of(vision.arch, vision.pretrained, first.loader.resize_mode, "mmgem.vision.arch")
    seen = look["resize_mode"]
    if config.loader.resize_mode not in (None, seen):
        raise UserError(f"loader.resize_mode: {init} was trained with {seen}; write that")
    if config.objective.coupled != first.objective.coupled:
        raise UserError(f"objective.coupled: {init} was trained with {first.objective.coupled}; write that")
    if recipe.prompts and first.mmgem.prompts and recipe.prompts != first.mmgem.prompts:
        raise UserError(f"mmgem.prompts: {init} has {first.mmgem.prompts}; remove it")
    taken = replace(
        recipe,
        # A region's weights are over all the patches.
        vision=replace(vision, patch_dropout=0.0) if recipe.stage2 is not None else vision,
        language=first.mmgem.language,
        tokenizer=TokenizerConfig(name_or_path=str(tokenizer)),
        embed_dim=first.mmgem.embed_dim,
        prompts=recipe.prompts or first.mmgem.prompts,
        h4=recipe.stage2 == "retrieval" or first.mmgem.h4,
        embed_tokens=recipe.embed_tokens or first.mmgem.embed_tokens or first.loader.max_tokens,
    )
    for name in TAKEN:  # a recipe may also be one that was completed before: RUN/config.yaml
        if getattr(recipe, name) not in (getattr(side, name) for side in (MMGemRecipe(), first.mmgem, taken)):
            raise UserError(f"mmgem.{name}: is that of {init}; remove it")
    return replace(config, mmgem=taken, loader=replace(config.loader, resize_mode=seen))


def check(config: TrainConfig) -> None:
    """
    Raises:
        UserError: stage 2 without a checkpoint to begin from, or without its prompts.
    """
    if config.mmgem is None or config.mmgem.stage2 is None:
        return
    if config.mmgem.init is None:
        raise UserError("mmgem.init: stage 2 begins from a checkpoint of stage 1; name its RUN/export")
    if config.mmgem.stage2 == "captioning" and not config.mmgem.prompts:
        raise UserError("mmgem.prompts: captioning trains soft prompts; the paper takes 64")


def made_of(recipe: MMGemRecipe, objective: dict[str, Any]) -> dict[str, Any] | None:
    """What the model of a run from `mmgem.init` is made of, where the first run says it: as that one's, with the parts
    and the objective of this recipe.

    Raises:
        UserError: no checkpoint there.
    """
    assert recipe.init is not None
    first = _record(Path(recipe.init))[2]
    return first and {**first, "prompts": recipe.prompts, "h4": recipe.h4, "objective": objective}


def weights(init: str) -> dict[str, Any]:
    """The weights of an export or a checkpoint, by name, fp32 where they were saved so."""
    from training import checkpoint
    from training.models.mmgem import MMGem

    if read_manifest(Path(init) / "gemsmith.json") is not None:
        return MMGem.from_pretrained(init).state_dict()
    return checkpoint.consolidated(Path(init))
