"""Every shipped recipe parses, every DeepSpeed file is whole, and bad recipes are refused in one line."""

import functools

import open_clip
import pytest
import yaml
from open_clip.pretrained import get_pretrained_cfg

from curation.errors import UserError
from tests.conftest import ROOT
from training.deepspeed_config import deepspeed_config
from training.train import parse

RECIPES = sorted((ROOT / "recipes/train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_recipes_parse_and_fit_every_deepspeed_file(recipe, stage):
    config = config_of(recipe, "--deepspeed", f"ds_configs/{stage}.json")
    settings = deepspeed_config(config, 2)
    assert settings["train_micro_batch_size_per_gpu"] * 2 == config.loader.batch
    assert settings["zero_optimization"]["stage"] == int(stage[4])


PAPERS = {
    "mmgem_stage1": {
        "samples": 81_920 * 80_000, "loader.batch": 81_920, "loader.max_tokens": 50, "optim.name": "lamb",
        "optim.lr": 5e-4, "optim.groups.0.lr": 5e-5, "optim.groups.0.pattern": r"^(vision|llm)\.",
        "optim.weight_decay": 0.05, "objective.temperature": 0.07, "objective.temperature_floor": 0.01,
        "objective.reduction": "sum", "objective.weights": {"embed": 1.0, "generate": 1.0}, "mmgem.stage2": None,
        "mmgem.vision.arch": "ViT-L-14",
    },
    "clip_b32": {
        "samples": 32 * 400_000_000, "loader.batch": 32_768, "optim.lr": 5e-4, "optim.warmup_steps": 2000,
        "optim.weight_decay": 0.2, "optim.betas": (0.9, 0.98), "optim.eps": 1e-6, "optim.schedule": "cosine",
        "objective.temperature": 0.07, "objective.temperature_floor": 0.01, "clip.pretrained": None,
    },
    "siglip_b16": {
        "samples": 9_000_000_000, "loader.batch": 32_768, "optim.lr": 1e-3, "optim.betas": (0.9, 0.95),
        "optim.weight_decay": 0.1, "objective.coupled": "siglip", "objective.temperature": 0.1,
        "objective.logit_bias": -10.0, "clip.arch": "ViT-B-16-SigLIP", "loader.resize_mode": "squash",
    },
    "vlm2vec_qwen2vl_lora": {
        "samples": 1024 * 5000, "loader.batch": 1024, "loader.unit": 64, "loader.chunk": 8, "optim.lr": 5e-5,
        "optim.warmup_steps": 100, "optim.schedule": "linear", "adapter.r": 16, "adapter.alpha": 64,
        "objective.temperature": 0.02, "objective.temperature_schedule": "constant", "vlm2vec.negatives": 1,
        "loader.sources.CIRR.weight": 0.5, "loader.sources.MSCOCO_i2t.limit": 120_000,
    },
    "vlm2vec_llava_next": {
        "samples": 1024 * 2000, "loader.batch": 1024, "loader.unit": 1, "optim.lr": 2e-5, "optim.warmup_steps": 200,
        "optim.schedule": "linear", "adapter.kind": "lora", "adapter.r": 8, "objective.temperature": 0.02,
        "objective.temperature_schedule": "constant", "objective.directions": "left_to_right", "vlm2vec.negatives": 0,
        "loader.sources.ImageNet_1K.limit": 50_000, "loader.sources.MSCOCO.kind": "rows",
    },
    "flava": {
        "loader.batch": 8192, "loader.unit": 8192, "loader.mixing": "round_robin", "optim.lr": 1e-3,
        "optim.weight_decay": 0.1, "optim.warmup_steps": 10_000, "optim.schedule": "cosine",
        "objective.temperature": 0.07, "objective.temperature_floor": 0.01, "objective.temperature_ceiling": 1.0,
        "flava.image_layers": 12, "flava.text_layers": 12, "flava.multimodal_layers": 6, "flava.hidden_size": 768,
        "flava.intermediate_size": 3072, "flava.image_size": 224, "flava.patch_size": 16,
        "flava.codebook.vocab_size": 8192, "flava.masks.patches": 75, "flava.masks.min_block": 16,
        "flava.masks.min_aspect": 0.3, "flava.masks.tokens": 0.15, "flava.masks.whole_words": ("pairs",),
        "flava.masks.mismatched": 0.1, "loader.sources.images.kind": "images", "loader.sources.texts.kind": "texts",
        "loader.resize_mode": "squash", "loader.crop_scale": (0.9, 1.0),
    },
    "negclip": {
        "samples": 5 * 113_287, "loader.batch": 256, "optim.lr": 1e-6, "optim.warmup_steps": 50, "clip.negatives": 1,
        "clip.arch": "ViT-B-32-quickgelu", "clip.pretrained": "openai", "optim.weight_decay": 0.2,
        "optim.betas": (0.9, 0.98), "optim.eps": 1e-6, "optim.schedule": "cosine", "optim.gradient_clipping": 0.0,
    },
    "coca_b32": {
        "samples": 65_536 * 500_000, "loader.batch": 65_536, "optim.lr": 8e-4, "optim.warmup_steps": 10_000,
        "optim.weight_decay": 0.01, "optim.betas": (0.9, 0.999), "optim.schedule": "linear",
        "objective.weights": {"embed": 1.0, "generate": 2.0}, "objective.temperature": 0.07,
        "clip.arch": "coca_ViT-B-32", "clip.pretrained": None,
    },
    "limber": {
        "samples": 2048 * 15_000, "loader.batch": 2048, "optim.lr": 8e-4, "optim.betas": (0.9, 0.95),
        "optim.weight_decay": 0.0, "optim.warmup_steps": 100, "optim.gradient_clipping": 1.0,
        "mmgem.mapping.kind": "linear", "optim.groups.0.frozen": True, "optim.groups.0.pattern": r"^(vision|llm)\.",
    },
    "mapl": {
        "samples": 10 * 414_113, "loader.batch": 128, "loader.captions": "random", "optim.lr": 3e-4,
        "optim.betas": (0.9, 0.95), "optim.weight_decay": 0.01, "optim.warmup_steps": 1500,
        "optim.schedule": "constant", "optim.gradient_clipping": 0.0, "mmgem.mapping.kind": "transformer",
        "mmgem.mapping.tokens": 32, "mmgem.mapping.width": 256, "mmgem.mapping.layers": 4, "mmgem.mapping.heads": 8,
        "optim.groups.0.frozen": True, "optim.groups.0.pattern": r"^(vision|llm)\.",
    },
}  # fmt: skip
"""../shared/facts/training.md and the papers and files that the recipes name."""


def test_vlm2vec_v1_draws_from_all_rows_alike():
    """Weights are each subset's thousands of rows, at most the limit."""
    sources = config_of(ROOT / "recipes/train/vlm2vec_llava_next.yaml").loader.sources
    second = config_of(ROOT / "recipes/train/vlm2vec_qwen2vl_lora.yaml").loader.sources
    assert set(sources) == set(second) and len(sources) == 20
    for name, source in sources.items():  # v2's limits are what there is of each, in round numbers
        assert 0.75 <= source.weight / min(50, second[name].limit / 1000) <= 1.02


def config_of(recipe, *more):
    sources = yaml.safe_load(recipe.read_text())["loader"].get("sources", ["data"])
    data = [word for name in sources for word in ("--data", f"{name}=d")]
    return parse(["--config", str(recipe), *data, "--out", "o", *more])[0]


def inside(value, name):
    if name.isdigit():
        return value[int(name)]
    return value[name] if isinstance(value, dict) else getattr(value, name)


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_papers_values_stand_in_their_recipes(recipe):
    config = config_of(ROOT / f"recipes/train/{recipe}.yaml")
    found = {name: functools.reduce(inside, name.split("."), config) for name in PAPERS[recipe]}
    assert found == PAPERS[recipe]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_what_recipes_name_is_there_and_their_batches_divide(recipe):
    """Architectures and weights by name are open_clip's, and a batch is whole chunks of whole units."""
    config = config_of(recipe)
    assert config.loader.batch % config.loader.chunk == 0 == config.loader.batch % config.loader.unit
    named = config.clip or (config.mmgem.vision if config.mmgem else None)
    if named is not None and named.arch is not None and not named.arch.startswith("local-dir:"):
        assert open_clip.get_model_config(named.arch) is not None
        assert named.pretrained is None or get_pretrained_cfg(named.arch, named.pretrained)


CLIP = ("--config", "recipes/train/tiny_clip.yaml", "--clip.model_cfg")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optim.learning_rate", "1"], "learning_rate"),
        (["--precision", "fp8"], "precision"),
        (["--config", "recipes/train/none.yaml"], "none.yaml"),
        (["--samples", "10"], "samples"),
        (["--loader.captions", "{txt: 0.5, recaption.txt: 0}"], "loader.captions"),
        (["--loader.captions", "{}"], "loader.captions"),
        (["--loader.captions", "{txt: 0.5, json: 0.5}"], r"^loader\.captions: 'json' is no text"),
        (["--loader.captions", "{uid: 1}"], r"^loader\.captions: 'uid'"),
        (["--loader.captions", "first"], "captions"),
        (["--config", "recipes/train/tiny_vlm2vec.yaml", "--vlm2vec.patch_dropout", "0.5"], "patch_dropout"),
        (["--mmgem.vision.patch_dropout", "1.0"], r"^mmgem\.vision\.patch_dropout: 1.0 is no share"),
        (["--config", "recipes/train/tiny_clip.yaml", "--clip.patch_dropout", "-0.1"], r"^clip\.patch_dropout: -0.1"),
        (["--config", "recipes/train/tiny_flava.yaml", "--flava.patch_dropout", "1.5"], r"flava\.patch_dropout: 1.5"),
        (["--mmgem.vision.width", "32"], r"^mmgem\.vision\.head_width: 64 does not divide width 32"),
        (["--mmgem.vision.patch_size", "128"], r"^mmgem\.vision\.patch_size: 128 is above image_size 64"),
        (["--mmgem.vision.layers", "0"], r"^mmgem\.vision\.layers: 0"),
        (["--mmgem.language.hidden_size", "129"], r"^mmgem\.language\.num_attention_heads: 2 does not divide"),
        (["--mmgem.language.num_attention_heads", "128"], r"^mmgem\.language\.num_attention_heads: 128 are 1 wide"),
        (["--mmgem.language.num_key_value_heads", "4"], r"^mmgem\.language\.num_key_value_heads: 4 does not divide"),
        ([*CLIP, "{embed_dim: 16, vision_cfg: {}}"], r"^clip\.model_cfg\.text_cfg: is needed"),
        ([*CLIP, "{vision_cfg: {width: 32}, text_cfg: {}}"], r"^clip\.model_cfg\.vision_cfg\.head_width: 64 does not"),
        ([*CLIP, "{vision_cfg: {}, text_cfg: {heads: 3}}"], r"^clip\.model_cfg\.text_cfg\.heads: 3 does not"),
        (["--adapter", "{kind: lora, module: llm, r: 0}"], "^adapter.r: 0"),
        (["--config", "recipes/train/tiny_flava.yaml", "--flava.masks.tokens", "1e-6"], r"flava\.masks\.tokens: 1e-06"),
    ],
)
def test_bad_recipes_name_what_is_wrong(arguments, named):
    base = [] if arguments[0] == "--config" else ["--config", "recipes/train/tiny_mmgem.yaml"]
    with pytest.raises(UserError, match=named) as error:
        parse([*base, "--data", "d", "--out", "o", *arguments])
    assert "\n" not in str(error.value)
