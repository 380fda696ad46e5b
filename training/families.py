"""What the loop needs of a model family, and the families by name.

A family is its model, how captions become tensors, what its images look like,
and how it is exported for people who take the model away.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.data import Drawn, ImageSpec, Source
from training.family_config import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """encode_text: captions -> tensors of a chunk · encode_query: captions -> input of `embed_texts` ·
    export: (state dict, folder) writes what `from_pretrained` or open_clip reads · read_export: the state back ·
    extra: (kind, rows) -> more tensors of a chunk, drawn from each row's `draw` ·
    prepare: trains or loads what `extra` needs of these sources, before the first chunk ·
    mismatched: (draw) -> whether the pair of that row is given another's text too, to be told apart."""

    model: Any
    image: ImageSpec
    encode_text: Callable[[list[str]], dict[str, torch.Tensor]]
    export: Callable[[dict[str, torch.Tensor], Path], None]
    read_export: Callable[[Path], dict[str, torch.Tensor]]
    tokenizer: Any
    extra: Callable[[str, Sequence[Drawn]], dict[str, torch.Tensor]] | None = None
    prepare: Callable[[Sequence[Source]], None] | None = None
    mismatched: Callable[[int], bool] | None = None


def _mmgem(config: TrainConfig, tokenizer_folder: Path, captions: Callable[[], Iterable[str]]) -> Family:
    from training.models.mmgem import MMGem
    from training.tokenizer import EMB, load_tokenizer, save_tokenizer

    assert config.mmgem is not None
    recipe = config.mmgem
    if tokenizer_folder.exists():
        tokenizer = load_tokenizer(TokenizerConfig(name_or_path=str(tokenizer_folder)), captions)
    else:
        tokenizer = load_tokenizer(recipe.tokenizer, captions)
        save_tokenizer(tokenizer, tokenizer_folder)
    model = MMGem.from_backbones(
        recipe.vision,
        recipe.language,
        tokenizer,
        embed_dim=recipe.embed_dim,
        objective={k: v for k, v in vars(config.objective).items() if k != "weights"},
        resize_mode=config.loader.resize_mode,
    )
    emb, eos, pad = tokenizer.convert_tokens_to_ids(EMB), tokenizer.eos_token_id, tokenizer.pad_token_id

    def encode_text(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=config.loader.max_tokens - 1)[
            "input_ids"
        ]
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
        model.vision,
        recipe.vision.patch_dropout,
        size=side,
        mean=tuple(model.config.image_mean),
        std=tuple(model.config.image_std),
    )
    return Family(
        model=model,
        image=spec,
        encode_text=encode_text,
        export=export,
        read_export=lambda folder: MMGem.from_pretrained(folder).state_dict(),
        tokenizer=tokenizer,
    )


def _clip(config: TrainConfig, tokenizer_folder: Path, captions: Callable[[], Iterable[str]]) -> Family:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.tokenizer import SimpleTokenizer

    from training.models.clip import Clip, export, read_export

    assert config.clip is not None
    model = Clip.from_recipe(config.clip, config.objective)
    side = model.model_cfg["vision_cfg"]["image_size"]
    spec = ImageSpec.of_vit(
        model.towers.visual, model.patch_dropout, size=side, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
    tokenizer = SimpleTokenizer(context_length=model.model_cfg["text_cfg"].get("context_length", 77))
    preprocess = {
        "size": [side, side],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": "bicubic",
        "resize_mode": config.loader.resize_mode,
    }
    return Family(
        model=model,
        image=spec,
        encode_text=lambda texts: {"input_ids": tokenizer(texts)},
        export=lambda state, folder: export(model, state, preprocess, folder),
        read_export=read_export,
        tokenizer=tokenizer,
    )


def _flava(config: TrainConfig, tokenizer_folder: Path, captions: Callable[[], Iterable[str]]) -> Family:
    from training.models.codebook import drawn_pictures, load_codebook
    from training.models.flava import Flava
    from training.models.flava_batch import Extra, encode, load_flava_tokenizer, padded
    from training.tokenizer import save_tokenizer

    assert config.flava is not None
    recipe = config.flava
    if tokenizer_folder.exists():
        tokenizer = load_flava_tokenizer(TokenizerConfig(name_or_path=str(tokenizer_folder)), captions)
    else:
        tokenizer = load_flava_tokenizer(recipe.tokenizer, captions)
        save_tokenizer(tokenizer, tokenizer_folder)
    model = Flava.from_recipe(
        recipe,
        tokenizer,
        objective={k: v for k, v in vars(config.objective).items() if k != "weights"},
        resize_mode=config.loader.resize_mode,
    )
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
        image=ImageSpec(size=recipe.image_size, mean=mean, std=std),
        encode_text=encode_text,
        export=export,
        read_export=lambda folder: Flava.from_pretrained(folder).state_dict(),
        tokenizer=tokenizer,
        extra=extra,
        prepare=prepare,
        mismatched=extra.mismatched,
    )


FAMILIES = {"mmgem": _mmgem, "clip": _clip, "flava": _flava}


def build(config: TrainConfig, tokenizer_folder: Path, captions: Callable[[], Iterable[str]]) -> Family:
    """The recipe's family; a tokenizer trained on `captions()` is kept in `tokenizer_folder` and used again."""
    torch.manual_seed(config.seed)
    return FAMILIES[config.family](config, tokenizer_folder, captions)
