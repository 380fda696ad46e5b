"""The training loop of one rank: loader -> gradient-cached step -> engine.step, until the samples are seen.

Everything a step needs is a function of its number (batch, learning rate,
random state), so resuming is loading the last complete checkpoint and counting on.
SIGTERM sets a flag that all ranks agree on after each step; then all of them
save together, which a signal handler could not.
"""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curation.errors import UserError
from curation.hashing import config_hash, hash64
from curation.manifest import write_manifest
from training import checkpoint
from training.config import TrainConfig, as_dict, deepspeed_config
from training.data import Loader, Shards
from training.distributed import World
from training.families import Family, build
from training.gradient_cache import Chunk, Outputs, gradient_cached_step
from training.log import RunLog
from training.objectives import COUPLED
from training.optim import adamw, factor, parameter_groups, set_lr


def bounded_scale(log_scale: torch.Tensor, floor: float) -> torch.Tensor:
    """log(1/temperature) held at 1/floor; past it only gradients that lead back pass.

    The parameter itself is never clamped in place, since ZeRO-3 holds it in parts.
    """
    ceiling = -math.log(floor)
    if log_scale.requires_grad and float(log_scale.detach()) > ceiling:
        log_scale.register_hook(lambda g: g.clamp(min=0.0))
    return log_scale + (log_scale.clamp(max=ceiling) - log_scale).detach()


@dataclass(slots=True)
class Trainer:
    """An engine and what feeds it."""

    engine: Any
    family: Family
    loader: Loader
    config: TrainConfig
    world: World

    def forward(self, chunk: Chunk, separable: bool) -> Outputs:
        out = Outputs(**self.engine(chunk, separable=separable))
        out.log_scale = bounded_scale(out.log_scale, self.config.objective.temperature_floor)
        return out

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def accumulate(self, chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
        """The gradient of one global batch, left in the engine."""
        objective, model = self.config.objective, self.family.model
        counts: dict[str, float] = {name: 0.0 for name in model.separable}
        for chunk in chunks:
            for name, count in model.counts(chunk).items():
                counts[name] += count
        return gradient_cached_step(
            forward=self.forward,
            backward=self.backward,
            chunks=chunks,
            counts=counts,
            weights={name: objective.weights.get(name, 1.0) for name in counts},
            coupled=COUPLED[objective.coupled](reduction=objective.reduction),
            world=self.world,
            retain=self.config.loader.retain > 0,
        )

    def step(self, number: int, chunks: Sequence[Chunk]) -> dict[str, float]:
        set_lr(self.engine.optimizer, share := factor(number, self.config.steps, self.config.optim))
        torch.manual_seed(hash64(self.config.seed, "step", number, self.world.rank) >> 1)
        metrics = self.accumulate([_on(self.engine.device, chunk) for chunk in chunks])
        if not math.isfinite(float(metrics["loss"])):
            raise UserError(
                f"step {number}: the loss is {float(metrics['loss'])}; lower optim.lr or raise warmup_steps"
            )
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return {
            **{name: float(value) for name, value in metrics.items()},
            "grad_norm": float(norm) if norm is not None else math.nan,
            "lr": self.config.optim.lr * share,
        }


def _on(device: torch.device, chunk: Chunk) -> Chunk:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in chunk.items()}


def make_trainer(config: TrainConfig, shards: Shards, run: Path) -> Trainer:
    """Build the model, its engine and its loader; the process group is up already."""
    import deepspeed

    world = World.current()
    tokenizer = run / "tokenizer"
    members = config.loader.captions if isinstance(config.loader.captions, dict) else None
    if world.rank == 0:
        family = build(config, tokenizer, lambda: shards.every_caption(members))
    world.barrier()
    if world.rank > 0:
        family = build(config, tokenizer, lambda: shards.every_caption(members))
    groups = parameter_groups(family.model.named_parameters(), config.optim)
    # ZeRO-3 gathers a transformer block at a time: its hooks on every small module of a block cost more than they save.
    deepspeed.utils.set_z3_leaf_modules(family.model, sorted(family.model.blocks), raise_if_not_found=False)
    engine, *_ = deepspeed.initialize(
        model=family.model,
        optimizer=adamw(groups, config.optim),
        config=deepspeed_config(config, world.size),
    )
    engine.train()
    loader = Loader(
        shards,
        config.loader,
        family.image,
        family.encode_text,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        cache=run / "decoded.u8" if config.loader.cache_decoded else None,
        collate=family.collate,
    )
    return Trainer(engine, family, loader, config, world)


def train(config: TrainConfig, shards_folder: Path, run: Path) -> bool:
    """Train to the end, or to a SIGTERM; whether the end was reached.

    Raises:
        UserError: bad data or configuration; more broken samples than `loader.max_error_rate` allows.
    """
    stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    shards = Shards(shards_folder)
    trainer = make_trainer(config, shards, run)
    world, recipe = trainer.world, as_dict(config)
    step, last = 0, checkpoint.latest(run)
    if last is not None:
        step = checkpoint.resume(trainer.engine, last)
    facts = {
        "config": recipe,
        "config_hash": config_hash(recipe),
        "zero_stage": trainer.engine.zero_optimization_stage(),
    }
    log = RunLog(run, step, config.steps) if world.rank == 0 else None
    resumed = step
    if log is not None and step:
        print(f"resuming after step {step}", flush=True)
    waited, since, begun, seen = 0.0, step, time.monotonic(), time.monotonic()
    for chunks in trainer.loader.batches(step, config.steps):
        waited += time.monotonic() - seen
        metrics = trainer.step(step, chunks)
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            errors = int(world.sum(torch.tensor([trainer.loader.errors])))
            drawn = (step - resumed) * config.loader.batch
            if errors > config.loader.max_error_rate * drawn:
                raise UserError(
                    f"loader.max_error_rate: {errors} of {drawn} samples could not be read; "
                    "look at the shards or raise it"
                )
            spent = time.monotonic() - begun
            if log is not None:
                log(
                    step,
                    {
                        "samples": step * config.loader.batch,
                        **metrics,
                        "samples_per_second": (step - since) * config.loader.batch / spent,
                        "data_share": waited / spent,
                        "errors": errors,
                    },
                )
            waited, since, begun = 0.0, step, time.monotonic()
        stopping = world.any(stop)
        if stopping or step % config.checkpoint_every == 0 or step == config.steps:
            samples = {"samples": step * config.loader.batch}
            checkpoint.save(trainer.engine, run, step, facts | samples, config.keep_last)
        if stopping and step < config.steps:
            break
        seen = time.monotonic()
    if log is not None:
        log.close()
    if step == config.steps and world.rank == 0:
        finish(trainer.family, config, run, step)
    world.barrier()
    return step == config.steps


def finish(family: Family, config: TrainConfig, run: Path, step: int) -> None:
    """Export the last checkpoint for people who take the model away, and close the run with its manifest."""
    from training.inference import rebuild

    last = checkpoint.step_folder(run, step)
    rebuild(config, run / "tokenizer").export(checkpoint.consolidated(last), run / "export")
    for cache in run.glob("decoded.*"):
        cache.unlink()
    facts = {"steps": step, "samples": step * config.loader.batch, "config": as_dict(config)}
    write_manifest(run / "export" / "gemsmith.json", facts)  # so that the export can be graded wherever it is taken
    write_manifest(run / "manifest.json", facts)
