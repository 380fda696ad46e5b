"""One rank of two: a gradient-cached ZeRO-3 step of a VLM with an adapter, whose gradients rank 0 saves."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from tests.training.vlm import ADAPTER, RECIPE
from training.data import Shards
from training.loop import make_trainer
from training.train import parse


def main() -> None:
    shards, run, *overrides = sys.argv[-5:]
    deepspeed.init_distributed()
    trainer = make_trainer(parse([*RECIPE, *ADAPTER, *overrides])[0], Shards(Path(shards)), Path(run))
    (chunks,) = list(trainer.loader.batches(0, 1))
    metrics = trainer.accumulate(chunks)
    trainer.engine.optimizer.finalize_gradient_accumulation_boundary()  # what step() does first
    moving = {name: p for name, p in trainer.engine.module.named_parameters() if p.requires_grad}
    gradients = {name: safe_get_full_grad(p) for name, p in moving.items()}
    if trainer.world.rank == 0:
        gradients = {name: g.clone() for name, g in gradients.items()}
        torch.save({"loss": metrics["loss"], "gradients": gradients}, Path(run) / "gradients.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
