"""One rank of those that test_reductions.py starts: the first steps of many settings, one after the other.

    rank_reductions.py SHARDS RUN

Rank 0 saves {(stage, precision, reduce_gradients, chunks of a rank): what `one_step` says}, with the traffic of the
second and third step as NAME_1 and NAME_2.
"""

import json
import os
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch

from tests.training.conftest import tiny_config
from tests.training.rank_gradients import one_step
from training.data import Shards
from training.distributed import open_group
from training.loop import make_trainer
from training.traffic import TRAFFIC

BATCH, CHUNKS = 32, (1, 4, 16)
LEAN = "3 without room for whole weights"
SETTINGS = [
    *product("23", ["fp32"], ["step"], CHUNKS),
    *product("3", ["fp32"], ["chunk"], (1, 4)),
    *product("23", ["bf16"], ["step"], (1, 4)),
    *product([LEAN], ["fp32"], ["step"], (4, 16)),
]


def main() -> None:
    shards, run = map(Path, sys.argv[1:3])
    TRAFFIC.install()
    open_group()
    found = {}
    lean = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    lean["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    files = {stage: ROOT / f"ds_configs/zero{stage}.json" for stage in "23"} | {LEAN: run / "lean.json"}
    run.mkdir(parents=True, exist_ok=True)
    files[LEAN].write_text(json.dumps(lean))
    for stage, precision, reduce, chunks in SETTINGS:
        config = tiny_config(
            *("--deepspeed", str(files[stage]), "--optim.gradient_clipping", "0"),
            *("--loader.retain", "0", "--loader.chunk", str(BATCH // torch.distributed.get_world_size() // chunks)),
            *("--precision", precision, "--reduce_gradients", reduce),
        )
        trainer = make_trainer(config, Shards(shards), run)
        found[stage, precision, reduce, chunks] = first = one_step(trainer)
        assert first["chunks"] == chunks
        for number, again in enumerate(trainer.loader.batches(1, 3), 1):  # ZeRO-3 gathers ahead once it knows the order
            TRAFFIC.take()
            trainer.step(number, again)
            first["traffic"] |= {f"{name}_{number}": value for name, value in TRAFFIC.take().items()}
        trainer.engine.destroy()
    if torch.distributed.get_rank() == 0:
        torch.save(found, run / "steps.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
