"""One rank of those that test_beginnings.py starts: a checkpoint of what every kind of ZeRO-3 run begins from, and its
first step.

    rank_beginnings.py FOLDER RUN
"""

import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch

from tests.training.beginnings import RECIPES
from training.checkpoint import Saver
from training.config import TrainConfig
from training.data import named, open_sources
from training.distributed import World, open_group
from training.loop import make_trainer


def begin(config: TrainConfig, data: Path, run: Path) -> list[float] | str:
    """Save the run's beginning as its checkpoint of step 0; [loss, gradient's norm] of the first step, or an error."""
    run.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(config, open_sources(config.loader, named(config.loader, [str(data)])), run)
    Saver(run, keep_last=1).save(trainer.engine, trainer.optimizer, 0, {})
    try:
        metrics = trainer.step(0, next(trainer.loader.batches(0, 1)))
        return [metrics["loss"], metrics["grad_norm"]]
    except RuntimeError:  # on every rank alike; the others are tried all the same
        return traceback.format_exc()


def main() -> None:
    folder, run = map(Path, sys.argv[1:3])
    open_group()
    steps = {name: begin(recipe(folder), folder / "shards", run / name) for name, recipe in RECIPES.items()}
    if World.current().rank == 0:
        (run / "steps.json").write_text(json.dumps(steps))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
