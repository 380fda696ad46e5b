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
KEPT, LEAN = "3 with room for whole weights", "3 without"
SETTINGS = [
    *product("23", ["fp32"], ["step"], CHUNKS),
    *product("3", ["fp32"], ["chunk"], (1, 4)),
    *product("23", ["bf16"], ["step"], (1, 4)),
    *product([KEPT, LEAN], ["fp32"], ["step"], (4, 16)),
]


def main() -> None:
    shards, run = map(Path, sys.argv[1:3])
    TRAFFIC.install()
    open_group()
    found = {}
    files = {stage: ROOT / f"ds_configs/zero{stage}.json" for stage in "23"}
    run.mkdir(parents=True, exist_ok=True)
    for name, room in ((KEPT, 10**9), (LEAN, 0)):
        settings, files[name] = json.loads(files["3"].read_text()), run / f"room{room}.json"
        settings["zero_optimization"] |= {"stage3_max_live_parameters": room, "stage3_max_reuse_distance": room}
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else all of the tiny model persists
        files[name].write_text(json.dumps(settings))
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
