"""One rank of those that tests/training/test_zero.py starts: a small model stepped at every stage it is told.

    python rank_zero.py FOLDER STAGE,STAGE... OPTIMISER ACTION

The gradient of step n is the same on every rank, and step n uses the parameters that `uses` says; so one plain process
can say what must come out. Before step SPOILT there is one whose loss is a number and whose gradient, on the last rank,
is none: nothing may come of it. ACTION: `whole` takes all the steps and saves at HALF; `resume` goes on from there.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from torch import nn

from training.config import OptimConfig

STEPS, HALF, SPOILT = 7, 4, 2
CLIP = 0.5


class Toy(nn.Module):
    """Odd sizes, so that stretches end anywhere; two learning rates, a frozen part, a buffer, a shared weight; three
    parameters in a group, which two ranks can hold in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3, bias=False)
        self.rarely, self.frozen = nn.Linear(3, 11), nn.Linear(3, 3)
        self.third = nn.Linear(4, 6)
        self.same = self.second
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, step: int, spoilt: bool = False) -> torch.Tensor:
        """A scalar whose gradient of each weight in use is `direction(step, name)`; infinite, where it is `spoilt`."""
        total = (self.scale * direction(step, "scale", (1,)).to(self.scale.dtype)).sum()
        for name in ("first", "second", "rarely", "third"):
            module = getattr(self, name)
            if uses(step, name):
                wide, deep = module.in_features, module.out_features
                out = module(torch.eye(wide, dtype=self.scale.dtype))  # the weight itself, and the bias
                total = total + (out * direction(step, name, (wide, deep)).to(out.dtype)).sum()
        return total + (total - total.detach()).sqrt() if spoilt else total


def uses(step: int, name: str) -> bool:
    return name != "rarely" or step in (1, 2, 5)


def direction(step: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 100 + step)
    return torch.randn(shape, generator=generator)


def optim(name: str) -> OptimConfig:
    from training.config import GroupConfig

    groups = [GroupConfig(pattern="^first", lr=3e-2), GroupConfig(pattern="^frozen", frozen=True)]
    return OptimConfig(name=name, lr=1e-2, weight_decay=0.1, groups=groups, schedule="constant", warmup_steps=3)


def settings(stage: str) -> dict:
    """stage: 2, 3-offload, 1-bf16, 3-once (chunks are summed before they are reduced), 2+overlap_comm=true, ..."""
    stage, *said = stage.split("+")
    zero = {"stage": int(stage[0]), "overlap_comm": False, "reduce_bucket_size": 1000}
    if stage[0] == "3":
        zero |= {"stage3_param_persistence_threshold": 10, "sub_group_size": 40}
    if "offload" in stage:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    zero |= {key: json.loads(value) for key, value in (word.split("=") for word in said)}
    return {
        "train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": "once" in stage,
        "gradient_clipping": CLIP if zero["stage"] else 0.0,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "bf16" in stage, "check_grad_overflow": "bf16" in stage},
        "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 10**9,
    }  # fmt: skip


def run(folder: Path, stage: str, name: str, action: str) -> None:
    import deepspeed

    from training import checkpoint, zero
    from training.distributed import World
    from training.optim import Sharded, factor, parameter_groups, set_lr

    world, model, config = World.current(), Toy(), optim(name)
    optimizer = Sharded(parameter_groups(model.named_parameters(), config), config)
    used = zero.Used(model.named_parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    optimizer.attach(zero.shards(engine), world)
    optimizer.clip = CLIP if stage == "0" else None
    once = engine.coalesce_grad_reduction if "-once" in stage else contextlib.nullcontext
    if "-once" in stage:
        zero.sum_in_fp32(engine)
    here = folder / f"{name}-{stage}"
    saver, first = checkpoint.Saver(here, keep_last=9, background="bf16" in stage), 0
    if action.startswith("resume"):
        saver = checkpoint.Saver(folder / f"{action}-{name}-{stage}", keep_last=9)
        first = checkpoint.resume(engine, optimizer, checkpoint.step_folder(here, HALF))

    def take(step: int, spoilt: bool) -> float:
        """A step; the norm of its gradient."""
        set_lr(engine.optimizer, factor(step, STEPS, config))
        zero.begin_step(engine)
        with once():
            for part in (0.25, 0.75):  # as two chunks
                loss = engine(step, spoilt and world.rank == world.size - 1) * part
                assert loss.isfinite()
                engine.backward(loss, scale_wrt_gas=False)
        optimizer.used = used.agree(world)
        engine.step()
        return optimizer.norm if optimizer.clip is not None else float(engine.get_global_grad_norm())

    for step in range(first, STEPS):
        if step == SPOILT:
            assert not math.isfinite(take(step, spoilt=True))
        norm = take(step, spoilt=False)
        if step + 1 in (HALF, STEPS):
            saver.save(engine, optimizer, step + 1, {"norm": norm, "zero_stage": int(stage[0])})
    saver.wait()
    if int(stage[0]) == 3:  # what the model computes with, against the masters that the checkpoint holds
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    else:
        state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    if world.rank == 0:
        torch.save(state, saver.run / "gathered.pt")
    world.barrier()
    engine.destroy()


def main() -> None:
    from training.distributed import open_group

    folder, stages, name, action = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    open_group()
    for stage in stages:
        run(folder, stage, name, action)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
