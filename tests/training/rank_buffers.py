"""One process that test_buffers.py starts: the first bf16 step of models that have buffers of numbers, where DeepSpeed
takes the whole model and where training/partitioned.py cuts it up.

    rank_buffers.py SHARDS RESNET RUN
"""

import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch

from tests.training.beginnings import vlm_config
from tests.training.conftest import clip_config
from tests.training.vlm import ADAPTER
from training.checkpoint import Saver
from training.config import TrainConfig
from training.data import Shards
from training.distributed import open_group
from training.loop import make_trainer

FROZEN = ("--optim.groups", "[{pattern: '^towers\\.visual\\.', frozen: true}]")
SMALL = ("--loader.batch", "12", "--loader.chunk", "4", "--clip.model_cfg", "null")
STAGES = (1, 3)
RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "rotary, vera": lambda _, *words: vlm_config(*ADAPTER, "--adapter.kind=vera", *words),
    "batch norm": lambda resnet, *words: clip_config(*SMALL, *FROZEN, "--clip.arch", f"local-dir:{resnet}", *words),
}
"""By name: the recipe, of a ResNet's export and more words."""


def main() -> None:
    shards, resnet, run = map(Path, sys.argv[1:])
    open_group()
    found = {}
    for name, stage in product(RECIPES, STAGES):
        config = RECIPES[name](resnet, "--precision", "bf16", "--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"))
        folder = run / name / str(stage)
        folder.mkdir(parents=True)
        trainer = make_trainer(config, Shards(shards), folder)
        metrics = trainer.step(0, next(trainer.loader.batches(0, 1)))
        Saver(folder, keep_last=1).save(trainer.engine, trainer.optimizer, 1, {})
        buffers = {n: buffer.clone() for n, buffer in trainer.engine.module.named_buffers()}
        found[f"{name} {stage}"] = {"loss": metrics["loss"], "buffers": buffers}
        trainer.engine.destroy()
    torch.save(found, run / "found.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
