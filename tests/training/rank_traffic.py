"""One rank of the two that a test launches: known collectives, then steps of a known model, counted."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist

from training.distributed import World, open_group
from training.objectives.coupled import Coupled, Rows
from training.objectives.infonce import InfoNCE
from training.objectives.siglip import SigLIP
from training.traffic import TRAFFIC

ROWS, WIDTH, NEGATIVES = 5, 4, 2
COUPLED = {
    "ring": (InfoNCE(gather="ring"), 1),
    "gathered": (InfoNCE(), 1),
    "one way": (InfoNCE(directions="left_to_right", duplicates="positive"), 1 + NEGATIVES),
    "siglip": (SigLIP(), 1),
}


def known(world: World) -> None:
    import deepspeed

    world.sum(torch.zeros(10, dtype=torch.float64))
    world.gather(torch.zeros(3, 4))
    world.scatter_sum(torch.zeros(6, 2))
    dist.all_gather([torch.zeros(5) for _ in range(2)], torch.zeros(5))
    deepspeed.comm.all_gather_into_tensor(torch.zeros(8), torch.zeros(4))
    deepspeed.comm.reduce_scatter_fn(torch.zeros(4), torch.zeros(8))
    deepspeed.comm.broadcast(torch.zeros(7, dtype=torch.bfloat16), 0)
    world.pass_on({"a": torch.zeros(6), "b": torch.zeros(2, dtype=torch.bfloat16)}, 0)[1]()
    world.pass_on({"c": torch.zeros(3, 3)}, 2)[1]()
    world.barrier()


def traffic_of(loss: Coupled, world: World, right_sides: int = 1) -> dict[str, float]:
    """A coupled loss of ROWS rows a rank, WIDTH wide."""
    there = torch.ones(ROWS, right_sides, dtype=torch.bool)
    rows = Rows(there[:, 0], there, torch.arange(ROWS))
    left, right = (torch.nn.functional.normalize(torch.randn(ROWS, *m, WIDTH), dim=-1) for m in ((), (right_sides,)))
    TRAFFIC.take()
    loss(left, right, {"log_scale": torch.zeros(1), "logit_bias": torch.zeros(1)}, rows, world)
    return TRAFFIC.take()


def step_of(stage: int) -> dict[str, float]:
    """Two layers of 64 x 64 and one step with one forward and one backward."""
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=settings
    )
    TRAFFIC.take()
    loss = engine(torch.randn(4, 64)).square().mean()
    engine.backward(loss)
    engine.step()
    return TRAFFIC.take()


def main() -> None:
    out = Path(sys.argv[-1])
    TRAFFIC.install()
    open_group()
    world = World.current()
    TRAFFIC.take()
    known(world)
    found = {"known": TRAFFIC.take(), **{name: traffic_of(loss, world, m) for name, (loss, m) in COUPLED.items()}}
    found |= {f"zero{stage}": step_of(stage) for stage in (2, 3)}
    (out / f"rank_{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
