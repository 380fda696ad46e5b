"""A model of stage 1 to begin from, and shards with regions: shared by the tests of MM-GEM's stage 2."""

from pathlib import Path

from curation.manifest import write_manifest
from tests.training.conftest import tiny_config, write_shards
from training.config import TrainConfig, as_dict
from training.data import Shards
from training.families import build
from training.train import parse

WORDS = ("red", "green", "blue", "grey", "small", "large")


def regions(number):
    """Two boxes of a 48 x 40 picture, with phrases that repeat over the set."""
    x = number % 20
    return [
        {"name": f"a {WORDS[number % 6]} thing", "bbox_xywh": [x, 2, 20, 30]},
        {"name": f"a {WORDS[(number + 2) % 6]} spot", "bbox_xywh": [30 - x, 10, 10, 12.5]},
    ]


def region_shards(folder: Path) -> Path:
    return write_shards(folder, [40, 25, 35], regions=regions)


def stage1(folder: Path, shards: Path, *overrides: str) -> Path:
    """An export of a model that nobody trained; what stage 2 does to it does not depend on that."""
    config = tiny_config(*overrides)
    family = build(config, folder / "tokenizer", Shards(shards).every_caption)
    family.export(family.model.state_dict(), folder / "export")
    write_manifest(folder / "export/gemsmith.json", {"steps": 0, "samples": 0, "config": as_dict(config)})
    return folder / "export"


SMALL = ["--loader.batch", "32", "--loader.chunk", "8", "--loader.retain", "8", "--optim.warmup_steps", "2"]


def arguments(stage: str, init: Path, *overrides: str) -> list[str]:
    prompts = ["--mmgem.prompts", "5"] if stage == "captioning" else []
    recipe = ["--config", f"recipes/train/tiny_mmgem_stage2_{stage}.yaml", "--mmgem.init", str(init)]
    return [*recipe, *prompts, *SMALL, *overrides]


def stage2_config(stage: str, init: Path, *overrides: str) -> TrainConfig:
    return parse([*arguments(stage, init, *overrides), "--data", "d", "--out", "o"])[0]
