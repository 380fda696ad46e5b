"""Recipes of every family, of every adapter and of every stage, small enough to begin in a second; shared by tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.training.bridges import bridge_config, write_backbones
from tests.training.conftest import clip_config, coca_config, flava_config, tiny_config
from tests.training.stage2 import region_shards, stage1, stage2_config
from tests.training.step import rounded
from tests.training.vlm import ADAPTER, QWEN, RECIPE
from training.config import TrainConfig
from training.data import Loader, Source, every_caption, named, open_sources
from training.distributed import World
from training.families import Family, build
from training.gradient_cache import Outputs, gradient_cached_step
from training.objectives import build as build_objective
from training.train import parse

FP32 = ("--loader.batch", "32", "--loader.chunk", "8", "--precision", "fp32")
BF16 = ("--loader.batch", "32", "--loader.chunk", "8", "--precision", "bf16")


def vlm_config(*overrides: str) -> TrainConfig:
    return parse([*RECIPE, "--vlm2vec.backbone", str(QWEN), *overrides])[0]


def write(folder: Path) -> Path:
    """FOLDER/shards, of pairs with regions, and all that the recipes begin from."""
    shards = region_shards(folder / "shards")
    write_backbones(folder)
    stage1(folder / "stage1", shards)
    return folder


RECIPES: dict[str, Callable[[Path], TrainConfig]] = {
    "mmgem": lambda _: tiny_config(),
    "mmgem lora": lambda _: tiny_config("--adapter", "{kind: lora, module: llm}"),
    "mmgem dora": lambda _: tiny_config("--adapter", "{kind: dora, module: llm}"),
    "mmgem prompt": lambda _: tiny_config("--adapter", "{kind: prompt, module: llm}"),
    "mmgem captioning": lambda folder: stage2_config("captioning", folder / "stage1/export"),
    "mmgem retrieval": lambda folder: stage2_config("retrieval", folder / "stage1/export", "--precision", "fp32"),
    "limber": lambda folder: bridge_config(folder, "limber", *BF16),
    "mapl": lambda folder: bridge_config(folder, "mapl", *FP32),
    "flava": lambda _: flava_config(*FP32),
    "flava lora": lambda _: flava_config(*FP32, "--adapter", "{kind: lora, module: image_model}"),
    "clip": lambda _: clip_config(*FP32),
    "clip lora": lambda _: clip_config(*FP32, "--adapter", "{kind: lora, module: towers}"),
    "coca": lambda _: coca_config("--loader.chunk", "3"),
    "coca vera": lambda _: coca_config("--loader.chunk", "3", "--adapter", "{kind: vera, module: towers}"),
    "vlm2vec": lambda _: vlm_config(),
    "vlm2vec lora": lambda _: vlm_config(*ADAPTER, "--precision", "bf16"),
    "vlm2vec vera": lambda _: vlm_config(*ADAPTER, "--adapter.kind=vera"),
    "vlm2vec prompt": lambda _: vlm_config(*ADAPTER, "--adapter.kind=prompt"),
}
"""By name: the recipe, of a folder that `write` has written."""


def begun(config: TrainConfig, shards: Path, tokenizer: Path) -> tuple[Family, list[Source]]:
    """The family as a run of one process begins, and its data."""
    sources = open_sources(config.loader, named(config.loader, [str(shards)]))
    family = build(config, tokenizer, lambda: every_caption(sources))
    if family.prepare is not None:
        family.prepare(sources)
    return family, sources


def first_step(config: TrainConfig, family: Family, sources: list[Source]) -> tuple[float, float]:
    """(loss, gradient's norm) of a run's first step in one process, without an engine; gradients stay."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model: Any = rounded(family.model, dtype)
    loader = Loader(
        sources, config.loader, family.image, family.encode_text, seed=config.seed, rank=0, world_size=1,
        dtype=dtype, extra=family.extra, mismatched=family.mismatched,
    )  # fmt: skip
    chunks = next(loader.batches(0, 1))
    metrics = gradient_cached_step(
        forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
        backward=lambda loss: loss.backward(),
        chunks=chunks,
        counts={name: sum(model.counts(chunk).get(name, 0.0) for chunk in chunks) for name in model.separable},
        weights=config.objective.weights,
        coupled=build_objective(config.objective),
        world=World(),
        retain=config.loader.retain != 0,
    )
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return float(metrics["loss"]), float(torch.stack([g.norm() for g in gradients]).norm())
