"""One rank of the two that a test launches: a single gradient-cached step, whose gradients rank 0 saves."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from tests.training.conftest import tiny_config
from training.data import Shards
from training.loop import make_trainer


def main() -> None:
    shards, run, (stage, retain) = Path(sys.argv[-4]), Path(sys.argv[-3]), sys.argv[-2:]
    deepspeed.init_distributed()
    config = tiny_config("--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"), "--loader.retain", retain)
    trainer = make_trainer(config, Shards(shards), run)
    (chunks,) = list(trainer.loader.batches(0, 1))
    metrics = trainer.accumulate(chunks)
    trainer.engine.optimizer.finalize_gradient_accumulation_boundary()  # what step() does first
    gradients = {name: safe_get_full_grad(p) for name, p in trainer.engine.module.named_parameters()}
    if trainer.world.rank == 0:
        gradients = {name: g.clone() for name, g in gradients.items()}
        torch.save({"loss": metrics["loss"], "gradients": gradients}, run / "gradients.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


main()
