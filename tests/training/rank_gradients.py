"""One rank of the two that a test launches: a single gradient-cached step of each family, whose gradients rank 0 saves.

    deepspeed --num_accelerators 2 rank_gradients.py SHARDS RUN STAGE FAMILY,... OVERRIDE...

The gradients are those that DeepSpeed hands to the optimiser, put together from all ranks' shards.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch

from tests.training.conftest import FAMILIES
from training import zero
from training.config import TrainConfig
from training.data import named, open_sources
from training.distributed import open_group
from training.loop import Trainer, make_trainer, settle_retention
from training.traffic import TRAFFIC


def arguments() -> list[str]:
    return [a for a in sys.argv[1:] if not a.startswith("--local_rank")]


def main() -> None:
    shards, run, stage, families, *overrides = arguments()
    settings = ["--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"), "--optim.gradient_clipping", "0", *overrides]
    TRAFFIC.install()
    open_group()
    found = {}
    for family in families.split(","):
        found[family] = gradients(FAMILIES[family](*settings), shards, Path(run) / family)
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(run) / "gradients.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def gradients(config: TrainConfig, shards: str, run: Path) -> dict[str, Any]:
    """Make a step of the recipe on a folder of shards, or on NAME=DIR,NAME=DIR."""
    run.mkdir(parents=True, exist_ok=True)
    sources = open_sources(config.loader, named(config.loader, shards.split(",")))
    trainer = make_trainer(config, sources, run)
    settle_retention(trainer)
    found = one_step(trainer)
    trainer.engine.destroy()
    return found


def one_step(trainer: Trainer) -> dict[str, Any]:
    """The first step's loss and gradients, whole on every rank, what it sent, and of how many chunks it was."""
    whole = {name: torch.zeros(0) for name in trainer.used.names}

    def record(*_) -> None:
        """Before the optimiser steps a shard: add this rank's part of its gradients."""
        for group in trainer.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                for s in trainer.optimizer.states[id(p)].shard.stretches:
                    whole[s.name] = torch.zeros(sizes[s.name]) if not whole[s.name].numel() else whole[s.name]
                    whole[s.name][s.offset : s.offset + s.size] = p.grad.view(-1)[s.start : s.start + s.size]

    shapes = {name: torch.Size(shape) for name, shape in zero.shapes(trainer.engine).items()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    recording = trainer.optimizer.register_step_pre_hook(record)
    (chunks,) = list(trainer.loader.batches(0, 1))
    TRAFFIC.take()
    metrics = trainer.step(0, chunks)
    traffic = TRAFFIC.take()
    recording.remove()
    gradients = {}
    for name in trainer.used.names:
        part = whole[name] if whole[name].numel() else torch.zeros(sizes[name])
        gradients[name] = (trainer.world.sum(part) if trainer.engine.zero_optimization_stage() else part).view(
            shapes[name]
        )
    facts = {"retain": trainer.loader.retain, "traffic": traffic, "chunks": len(chunks)}
    return {"loss": torch.tensor(metrics["loss"]), "gradients": gradients, **facts}


if __name__ == "__main__":
    main()
