"""One rank of those that test_reductions.py starts: the first steps of many settings, one after the other.

    rank_reductions.py SHARDS RUN

Rank 0 saves {(stage, precision, reduce_gradients, chunks of a rank): what `one_step` says}, with the traffic of the
second and third step as NAME_1 and NAME_2; and under "spoilt" what `spoilt_step` says of the two after them.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch

from tests.training.conftest import tiny_config
from tests.training.rank_gradients import one_step
from training.data import Shards
from training.distributed import open_group
from training.gradient_cache import Chunk
from training.loop import Trainer, make_trainer
from training.traffic import TRAFFIC

BATCH, CHUNKS = 32, (1, 4, 16)
KEPT, LEAN = "3 with room for whole weights", "3 without"
SETTINGS = [
    *product("23", ["fp32"], ["step"], CHUNKS),
    *product("3", ["fp32"], ["chunk"], (1, 4)),
    *product("23", ["bf16"], ["step"], (1, 4)),
    *product([KEPT, LEAN], ["fp32"], ["step"], (4, 16)),
    *product("0", ["fp32"], ["step"], (4,)),
]


def spoilt_step(trainer: Trainer, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """A step whose loss is a number and whose gradient, on the last rank alone, is none; then an ordinary one."""

    def spoil(module: Any, inputs: Any, out: dict[str, Any]) -> dict[str, Any]:
        if "sums" in out:
            loss = out["sums"]["generate"]
            out["sums"]["generate"] = loss + (loss - loss.detach()).sqrt()  # 0, whose root has an infinite slope
        return out

    def state() -> list[torch.Tensor]:
        found = []
        for s in trainer.optimizer.states.values():
            found += [s.shard.flat.detach().clone(), *(m.clone() for m in s.moments.values()), torch.tensor(s.steps)]
        return found

    before, spoiling = state(), contextlib.nullcontext()
    if trainer.world.rank == trainer.world.size - 1:
        spoiling = trainer.engine.module.register_forward_hook(spoil)
    with spoiling:
        left_out = trainer.step(3, chunks)
    kept, in_a_row = all(map(torch.equal, state(), before)), trainer.health.in_a_row
    taken = trainer.step(4, chunks)
    moved = all(bool(x.isfinite().all()) for x in state()) and not all(map(torch.equal, state(), before))
    steps = [{name: step[name] for name in ("loss", "grad_norm", "skipped_steps")} for step in (left_out, taken)]
    changed, stuck = (trainer.world.any(not fine) for fine in (kept, moved))
    return {"steps": steps, "in_a_row": [in_a_row, trainer.health.in_a_row], "changed": changed, "stuck": stuck}


def main() -> None:
    shards, run = map(Path, sys.argv[1:3])
    TRAFFIC.install()
    open_group()
    found = {}
    files = {stage: ROOT / f"ds_configs/zero{stage}.json" for stage in "023"}
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
        first["spoilt"] = spoilt_step(trainer, again)
        trainer.engine.destroy()
    if torch.distributed.get_rank() == 0:
        torch.save(found, run / "steps.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
