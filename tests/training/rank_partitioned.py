"""One rank of those that test_partitioned.py starts: a deep model built in parts and then whole, in measured memory;
and a checkpoint of what every kind of ZeRO-3 run begins from, with the loss of its first step.

    rank_partitioned.py FOLDER RUN
"""

import json
import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from torch import nn

from tests.training.beginnings import RECIPES
from training.checkpoint import Saver
from training.config import TrainConfig
from training.data import named, open_sources
from training.distributed import World, open_group
from training.loop import make_trainer
from training.partitioned import Deferred, partition

LAYERS, WIDTH = 8, 3072
"""Layers of 36 MiB: what is freed of less than 32, glibc may keep."""
SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def deep(layers: int = LAYERS) -> nn.Module:
    """288 MiB, drawn twice as transformers' models are: by the layers' constructors, and then by the model's."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    return model


def peak() -> float:
    """MiB that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, float]:
    from deepspeed.runtime.zero import GatheredParameters

    for layers in (2, LAYERS):  # the first time for what is allocated once
        start = peak()
        with Deferred() as deferred:
            parts = deep(layers)
        built = peak()
        partition(parts, deferred, SETTINGS, torch.float32)
    in_parts = peak()
    whole = deep()
    same = True
    for a, b in zip(parts.parameters(), whole.parameters()):
        with GatheredParameters([a]):
            same &= torch.equal(a, b)
    growth = {"built": built - start, "parts": in_parts - start, "whole": peak() - in_parts}
    return growth | {"tracked": deferred.peak / 2**20, "same": same}


def begin(config: TrainConfig, data: Path, run: Path) -> float:
    """Save the run's beginning as its checkpoint of step 0, and take its first step; the loss."""
    run.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(config, open_sources(config.loader, named(config.loader, [str(data)])), run)
    Saver(run, keep_last=1).save(trainer.engine, trainer.optimizer, 0, {})
    return trainer.step(0, next(trainer.loader.batches(0, 1)))["loss"]


def main() -> None:
    folder, run = map(Path, sys.argv[1:3])
    open_group()
    rank = World.current().rank
    run.mkdir(parents=True, exist_ok=True)
    (run / f"memory_{rank}.json").write_text(json.dumps(memory()))
    losses = {name: begin(recipe(folder), folder / "shards", run / name) for name, recipe in RECIPES.items()}
    if rank == 0:
        (run / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
