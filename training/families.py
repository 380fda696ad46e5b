"""What the loop needs of a model family, and the families by name.

A family is its model, how captions become tensors, what its images look like,
and how it is exported for people who take the model away.

A run begins from what its recipe names (backbones by folder, or on the hub) and
is whole without it from then on: what its model is made of (`made_of`, an
export's config.json) lies in every checkpoint's manifest, its tokenizer in
RUN/tokenizer, and a model is made again from these alone.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from curation.errors import UserError
from curation.preprocess import LOCAL, NAMES
from training.config import AdapterConfig, TrainConfig
from training.data import Drawn, ImageSpec, Source
from training.family_config import ClipRecipe, MMGemRecipe, TokenizerConfig
from training.look import look_of
from training.tokenizer import take_turns

Captions = Callable[[], Iterable[str]]
MadeOf = dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Family:
    """made_of: as an export's config.json has it, sizes and all, for `build` to make the same again ·
    encode_text: captions -> tensors of a chunk ·
    encode_query: texts -> tensors to embed outside training, where they may be longer ·
    export: (state dict, folder) writes what `from_pretrained` or open_clip reads · read_export: the state back ·
    extra: (kind, rows) -> more tensors of a chunk, drawn from each row's `draw` ·
    prepare: trains or loads what `extra` needs of these sources, or the weights that the run begins from, before the
    first chunk ·
    mismatched: (draw) -> whether the pair of that row is given another's text too, to be told apart ·
    encode_images: pictures -> input of `get_image_features`, where they are not squares of one size."""

    model: Any
    made_of: dict[str, Any]
    image: ImageSpec
    encode_text: Callable[[list[str]], dict[str, torch.Tensor]]
    export: Callable[[dict[str, torch.Tensor], Path], None]
    read_export: Callable[[Path], dict[str, torch.Tensor]]
    tokenizer: Any
    extra: Callable[[str, Sequence[Drawn]], dict[str, torch.Tensor]] | None = None
    prepare: Callable[[Sequence[Source]], None] | None = None
    mismatched: Callable[[int], bool] | None = None
    encode_images: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None
    encode_query: Callable[[list[str]], dict[str, torch.Tensor]] | None = None


def _kept_tokenizer(load: Callable[..., Any], recipe: TokenizerConfig, folder: Path, captions: Captions) -> Any:
    """The run's tokenizer, from its folder where it was made before."""
    from training.tokenizer import save_tokenizer

    if folder.exists():
        return load(TokenizerConfig(name_or_path=str(folder)), captions)
    tokenizer = load(recipe, captions)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _check_words(field: str, words: int, rows: int, mend: str) -> None:
    """
    Raises:
        UserError: a tokenizer of more words than the model has rows for, past which an id would read.
    """
    if words > rows:
        raise UserError(f"{field}: the tokenizer has {words} words, and the model rows for {rows}; {mend}")


def _settings(model: Any) -> dict[str, Any]:
    """A model's config, as its folder would have it."""
    return json.loads(model.config.to_json_string())


def _swaps(recipe: ClipRecipe | MMGemRecipe, encode_text: Any) -> Any:
    """The recipe's hard negative captions, as a family's `extra`."""
    from training.data.swaps import Swaps, tagger_of

    return Swaps(recipe.negatives, tagger_of(recipe.tagger), encode_text) if recipe.negatives else None


def _mmgem(config: TrainConfig, tokenizer_folder: Path, captions: Captions, made_of: MadeOf = None) -> Family:
    from training import begin
    from training.models import mmgem_regions
    from training.models.bridge import Bridge
    from training.models.mmgem import MMGem
    from training.tokenizer import EMB, caption_ids, load_tokenizer

    assert config.mmgem is not None
    recipe = config.mmgem
    kind: type[MMGem] = MMGem if recipe.mapping is None else Bridge
    load = load_tokenizer if recipe.mapping is None else partial(load_tokenizer, added=())
    words = recipe.tokenizer
    if words.name_or_path is None and made_of is None:
        words = replace(words, name_or_path=recipe.language.name_or_path)  # ids of other words would mean nothing to it
    tokenizer = _kept_tokenizer(load, words, tokenizer_folder, captions)
    objective = {k: v for k, v in vars(config.objective).items() if k != "weights"}
    begins = recipe.init is not None and made_of is None
    if begins:
        made_of = begin.made_of(recipe, objective)
    if made_of is None:
        look = look_of(recipe.vision.arch, recipe.vision.pretrained, config.loader.resize_mode, "mmgem.vision.arch")
        model = kind.from_backbones(
            recipe.vision,
            recipe.language,
            tokenizer,
            embed_dim=recipe.embed_dim,
            objective=objective,
            image_mean=look["mean"],
            image_std=look["std"],
            interpolation=look["interpolation"],
            resize_mode=look["resize_mode"],
            prompts=recipe.prompts,
            h4=recipe.h4,
            **({} if recipe.mapping is None else {"mapping": asdict(recipe.mapping)}),
        )
    else:
        model = kind(kind.config_class.from_dict(made_of))
    if recipe.stage2 is not None:
        mmgem_regions.begin_stage(model, recipe.stage2)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    emb = tokenizer.convert_tokens_to_ids(EMB) if recipe.mapping is None else pad  # a bridge never reads it

    longest_text = getattr(model.llm.config, "max_position_embeddings", math.inf)
    embed_tokens = recipe.embed_tokens or config.loader.max_tokens
    if recipe.mapping is None:
        before = max(1, recipe.prompts)  # a caption's, with the picture in the place of [EMB]
    else:
        before = math.prod(model.grid) if recipe.mapping.kind == "linear" else recipe.mapping.tokens
        before -= 1  # so is the last of the visual tokens
    for name, tokens, places in [
        ("loader.max_tokens", config.loader.max_tokens, longest_text - before),
        ("mmgem.embed_tokens", embed_tokens, longest_text),
    ]:
        if tokens > places:
            beside = f" beside {before + 1} visual tokens" if recipe.mapping is not None else ""
            raise UserError(f"{name}: {tokens} is more than the {places} positions of the LLM{beside}; lower it")

    def encode_text(texts: list[str], max_tokens: int = config.loader.max_tokens) -> dict[str, torch.Tensor]:
        ids = caption_ids(tokenizer, texts, max_tokens - 1)
        longest = max(map(len, ids)) + 1
        return {
            "input_ids": torch.tensor([row + [emb] + [pad] * (longest - 1 - len(row)) for row in ids]),
            "labels": torch.tensor([row + [eos] + [-100] * (longest - 1 - len(row)) for row in ids]),
            "length": torch.tensor([len(row) for row in ids]),
        }

    def export(state: dict[str, torch.Tensor], folder: Path) -> None:
        model.load_state_dict(state)
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    side = int(model.vision.image_size[0])
    spec = ImageSpec.of_vit(
        model.grid,
        recipe.vision.patch_dropout,
        size=side,
        mean=tuple(model.config.image_mean),
        std=tuple(model.config.image_std),
        interpolation=model.config.interpolation,
        resize_mode=model.config.resize_mode,
    )

    def prepare(sources: Sequence[Source]) -> None:
        assert recipe.init is not None
        mmgem_regions.begin_from(model, begin.weights(recipe.init), recipe.init)

    return Family(
        model=model,
        made_of=_settings(model),
        image=replace(spec, grid=model.grid),
        encode_text=encode_text,
        encode_query=lambda texts: encode_text(texts, embed_tokens),
        prepare=prepare if begins else None,
        export=export,
        read_export=lambda folder: kind.from_pretrained(folder).state_dict(),
        tokenizer=tokenizer,
        extra=_swaps(recipe, encode_text),
    )


def _clip(config: TrainConfig, tokenizer_folder: Path, captions: Captions, made_of: MadeOf = None) -> Family:
    from training.models.clip import Clip, export, read_export
    from training.models.clip_words import Words, words_of
    from training.models.patches import grid_of
    from training.tokenizer import save_tokenizer

    assert config.clip is not None
    recipe = config.clip
    if made_of is None:
        look = look_of(recipe.arch, recipe.pretrained, config.loader.resize_mode, "clip.arch")
        model = Clip.from_recipe(recipe, config.objective)
    else:
        look = {name: made_of["preprocess_cfg"][name] for name in NAMES}
        look |= {"mean": tuple(look["mean"]), "std": tuple(look["std"])}
        sizes = {"model_cfg": made_of["model_cfg"], "patch_dropout": made_of.get("patch_dropout")}
        model = Clip.from_recipe(ClipRecipe(**sizes), config.objective)
    text_cfg = model.model_cfg["text_cfg"]
    side = model.model_cfg["vision_cfg"].get("image_size", 224)
    spec = ImageSpec.of_vit(grid_of(model.towers.visual), model.patch_dropout, size=side, **look)
    preprocess = {"size": [side, side], **look}
    exported = Path(recipe.arch.removeprefix(LOCAL)) if recipe.arch and recipe.arch.startswith(LOCAL) else None
    tokenizer = words_of(text_cfg, tokenizer_folder if tokenizer_folder.exists() else exported)
    if text_cfg.get("hf_tokenizer_name") and not tokenizer_folder.exists():
        save_tokenizer(tokenizer, tokenizer_folder)
    for part in ("text_cfg", "multimodal_cfg"):
        if isinstance(tokenizer, Words) and (rows := model.model_cfg.get(part, {}).get("vocab_size")) is not None:
            words = tokenizer.vocab_size
            _check_words(f"clip.model_cfg.{part}.vocab_size", words, rows, f"write {words}")

    def encode_text(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": tokenizer(texts)}

    return Family(
        model=model,
        made_of={"model_cfg": model.model_cfg, "preprocess_cfg": preprocess, "patch_dropout": model.patch_dropout},
        image=spec,
        encode_text=encode_text,
        export=lambda state, folder: export(model, state, preprocess, folder),
        read_export=lambda folder: read_export(model, folder),
        tokenizer=tokenizer,
        extra=_swaps(recipe, encode_text),
    )


def _flava(config: TrainConfig, tokenizer_folder: Path, captions: Captions, made_of: MadeOf = None) -> Family:
    from training.models.codebook import drawn_pictures, load_codebook
    from training.models.flava import Flava, FlavaConfig
    from training.models.flava_batch import Extra, encode, load_flava_tokenizer, padded

    assert config.flava is not None
    recipe = config.flava
    resize_mode = config.loader.resize_mode or "squash"
    tokenizer = _kept_tokenizer(load_flava_tokenizer, recipe.tokenizer, tokenizer_folder, captions)
    if made_of is None:
        objective = {k: v for k, v in vars(config.objective).items() if k != "weights"}
        model = Flava.from_recipe(recipe, tokenizer, objective=objective, resize_mode=resize_mode)
    else:
        model = Flava(FlavaConfig.from_dict(made_of))
    mean, std = tuple(model.config.image_mean), tuple(model.config.image_std)

    def encode_text(texts: list[str]) -> dict[str, torch.Tensor]:
        ids, _ = encode(tokenizer, texts, config.loader.max_tokens)
        return {"input_ids": padded(ids, tokenizer.pad_token_id)}

    extra = Extra(
        tokenizer=tokenizer,
        masks=recipe.masks,
        size=recipe.image_size,
        grid=recipe.image_size // recipe.patch_size,
        max_tokens=config.loader.max_tokens,
    )

    def prepare(sources: Sequence[Source]) -> None:
        pictures = drawn_pictures(sources, extra.grid, config.loader)
        extra.codebook = load_codebook(recipe.codebook, tokenizer_folder.with_name("codebook"), pictures)

    def export(state: dict[str, torch.Tensor], folder: Path) -> None:
        model.load_state_dict(state)
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    return Family(
        model=model,
        made_of=_settings(model),
        image=ImageSpec.of_vit(
            (extra.grid, extra.grid),
            recipe.patch_dropout,
            size=recipe.image_size,
            mean=mean,
            std=std,
            resize_mode=resize_mode,
        ),
        encode_text=encode_text,
        export=export,
        read_export=lambda folder: Flava.from_pretrained(folder).state_dict(),
        tokenizer=tokenizer,
        extra=extra,
        prepare=prepare,
        mismatched=extra.mismatched,
    )


def _vlm2vec(config: TrainConfig, tokenizer_folder: Path, captions: Captions, made_of: MadeOf = None) -> Family:
    from PIL import Image

    from training.data.rows import Item, Row
    from training.models.vlm2vec import Vlm2Vec, Vlm2VecConfig, recipe_processor
    from training.models.vlm_inputs import Inputs, instruct
    from training.tokenizer import save_tokenizer

    assert config.vlm2vec is not None
    recipe = config.vlm2vec
    kept = tokenizer_folder if tokenizer_folder.exists() else None
    known = None if made_of is None else Vlm2VecConfig.from_dict(made_of)
    if known is not None:
        known.trust_remote_code = recipe.trust_remote_code
    processor, settings = recipe_processor(recipe, kept, captions, known)
    if kept is None:
        save_tokenizer(processor, tokenizer_folder)
    limits: dict[str, Any] = {"max_tokens": config.loader.max_tokens, "longest": config.loader.decode_size}
    inputs = Inputs(processor, settings, negatives=recipe.negatives, **limits)
    model = Vlm2Vec.from_recipe(recipe, settings, config.objective) if known is None else Vlm2Vec(known)
    if recipe.processor is not None and (words := getattr(processor, "tokenizer", None)) is not None:
        rows = len(model.backbone.get_input_embeddings().weight)
        _check_words("vlm2vec.processor", len(words), rows, "take the backbone's own")
    task = instruct(recipe.instruction, image=True)

    def row_of(drawn: Drawn) -> Row | None:
        """A picture (uint8 [h, w, 3]) with its caption is a query that should find the caption."""
        if drawn.reason:
            return None
        if "row" in drawn.fields:
            return drawn.fields["row"]
        picture = Image.fromarray(drawn.fields["pixels"])
        return Row(query=Item(text=task, image=picture), positive=Item(text=drawn.fields["text"]))

    def export(state: dict[str, torch.Tensor], folder: Path) -> None:
        model.load_state_dict(state)
        model.float().save_pretrained(folder)
        processor.save_pretrained(str(folder))

    return Family(
        model=model,
        made_of=_settings(model),
        image=ImageSpec(
            size=config.loader.decode_size or 0, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="fit", raw=True
        ),
        encode_text=lambda texts: inputs.side([Item(text=text) for text in texts], picture=False),
        export=export,
        read_export=lambda folder: Vlm2Vec.from_pretrained(
            folder, trust_remote_code=recipe.trust_remote_code
        ).state_dict(),
        tokenizer=processor,
        extra=lambda kind, rows: inputs.collate([row_of(drawn) for drawn in rows]),
        encode_images=lambda pictures: inputs.side([Item(text=task, image=picture) for picture in pictures]),
    )


FAMILIES = {"mmgem": _mmgem, "clip": _clip, "flava": _flava, "vlm2vec": _vlm2vec}


def build(config: TrainConfig, tokenizer_folder: Path, captions: Captions, made_of: MadeOf = None) -> Family:
    """The recipe's family; a tokenizer trained on `captions()` is kept in `tokenizer_folder` and used again.

    Args:
        made_of: of the model whose weights, an adapter's too, are loaded into this one afterwards. Nothing that the
            recipe names is opened then, but what QLoRA packs: that is never loaded (training/adapters.py).
    """
    torch.manual_seed(config.seed)
    adapter = config.adapter
    if adapter is not None and made_of is not None:
        adapter = replace(adapter, init_from=None)
        made_of = None if adapter.kind == "qlora" else made_of
    family = FAMILIES[config.family](config, tokenizer_folder, captions, made_of)
    take_turns(getattr(family.tokenizer, "tokenizer", family.tokenizer))  # in a processor, or open_clip's wrapper
    return family if adapter is None else _adapted(family, config, adapter)


def _adapted(family: Family, recipe: TrainConfig, config: AdapterConfig) -> Family:
    """The family with the recipe's adapter in its model; it exports the adapter and all else that trained."""
    from training import adapters

    model = family.model
    adapters.apply(model, config)
    adapters.check_groups(model, config, recipe.optim.groups)

    def export(state: dict[str, torch.Tensor], folder: Path) -> None:
        model.load_state_dict(state)
        model.float()
        adapters.export(model, config, folder)
        if config.merge:
            (folder / adapters.TRAINED).unlink()
            adapters.merge(model, config)
            family.export(model.state_dict(), folder)
        elif hasattr(family.tokenizer, "save_pretrained"):
            family.tokenizer.save_pretrained(str(folder))

    return replace(family, export=export, read_export=lambda folder: adapters.read_export(model, config, folder))
