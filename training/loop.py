"""The training loop of one rank: loader -> gradient-cached step -> engine.step, until the samples are seen.

Everything a step needs is a function of its number (batch, learning rate,
random state), so resuming is loading the last complete checkpoint and counting on.
SIGTERM sets a flag that all ranks agree on after each step; then all of them
save together, which a signal handler could not.
"""

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from curation.errors import UserError
from curation.hashing import config_hash, hash64
from curation.manifest import write_manifest
from training import adapters, checkpoint, resumption, retention, zero
from training.config import TrainConfig, as_dict
from training.data import COUNTS, REASONS, Budget, Loader, Shards, Source, every_caption, open_sources
from training.deepspeed_config import deepspeed_config, reduces_once
from training.distributed import World
from training.families import Family, build
from training.flops import FlopMeter
from training.gradient_cache import Chunk, Outputs, gradient_cached_step
from training.health import Health, kind_of
from training.objectives import build as build_objective
from training.objectives.temperature import log_scale_at
from training.optim import Sharded, factor, parameter_groups, set_lr
from training.partitioned import Deferred, partition
from training.sight import Sight

MADE = ("tokenizer", "codebook")
"""What rank 0 makes in RUN before the others build theirs."""


@dataclass(slots=True)
class Trainer:
    """An engine and what feeds it. last: the checkpoint to go on from, the same on every rank."""

    engine: Any
    optimizer: Sharded
    used: zero.Used
    family: Family
    loader: Loader
    config: TrainConfig
    world: World
    health: Health
    last: Path | None = None
    flops: FlopMeter = field(default_factory=FlopMeter)
    number: int = 0
    masters: dict[str, torch.Tensor] = field(default_factory=dict)

    def forward(self, chunk: Chunk, separable: bool) -> Outputs:
        # A chunk at a time, and for the second pass again: a rank's whole batch of pictures would take gigabytes.
        there = _on(self.engine.device, chunk)
        out = Outputs(**self.flops.forward(lambda: self.engine(there, separable=separable), chunk, separable))
        for name, value in out.scalars.items():
            # The master's value with the parameter's gradient: bf16 would round a temperature to 1 %.
            if name in self.masters:
                value = value + (self.masters[name] - value).detach()
            if name == "log_scale":
                value = log_scale_at(value, self.config.objective, self.number, self.config.steps)
            out.scalars[name] = value
        return out

    def backward(self, loss: torch.Tensor) -> None:
        self.flops.backward(lambda: self.engine.backward(loss, scale_wrt_gas=False))

    def accumulate(self, chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
        """The gradient of one global batch, left in the engine."""
        objective, model = self.config.objective, self.family.model
        counts: dict[str, float] = {name: 0.0 for name in model.separable}
        for chunk in chunks:
            for name, count in model.counts(chunk).items():
                counts[name] += count
        once = len(chunks) > 1 and reduces_once(self.config, self.engine.zero_optimization_stage())
        with self.engine.coalesce_grad_reduction() if once else contextlib.nullcontext():
            return gradient_cached_step(
                forward=self.forward,
                backward=self.backward,
                chunks=chunks,
                counts=counts,
                weights=objective.weights,
                coupled=self.flops.coupled(build_objective(objective)),
                world=self.world,
                retain=self.loader.retain > 0,
            )

    def begin(self, number: int) -> None:
        """Make ready for the chunks of a step."""
        self.number = number
        zero.begin_step(self.engine)
        shards = [state.shard for state in self.optimizer.states.values()]
        shards += [zero.Shard(values, (s.name,), [s], True) for s, values in self.optimizer.frozen.items()]
        rounded = self.config.precision == "bf16"  # then the frozen ones too
        names = [name for name in self.family.model.scalars if rounded or name in self.used.names]
        masters = zero.masters(shards, names, self.world)
        # There before a chunk asks for them: a copy in its midst would wait for all that the GPU has yet to do.
        self.masters = {name: value.to(self.engine.device) for name, value in masters.items()}

    def step(self, number: int, chunks: Sequence[Chunk]) -> dict[str, float]:
        set_lr(self.engine.optimizer, share := factor(number, self.config.steps, self.config.optim))
        torch.manual_seed(hash64(self.config.seed, "step", number, self.world.rank) >> 1)
        self.begin(number)
        metrics = self.accumulate(chunks)
        loss, kind, used = float(metrics["loss"]), kind_of(metrics), self.used.agree(self.world)
        self.optimizer.used = frozenset() if self.health.trouble(loss, None, kind) else used
        self.engine.step()  # drops a step whose gradient is not finite
        norm = self.optimizer.norm if self.optimizer.clip is not None else float(self.engine.get_global_grad_norm())
        why = self.health.skip(number, loss, norm, kind)
        if why is not None and self.world.rank == 0:
            print(f"step {number + 1} is left out: {why}", flush=True)
        return {
            **{name: float(value) for name, value in metrics.items()},
            "grad_norm": norm,
            "lr": self.config.optim.lr * share,
            "skipped_steps": self.health.skipped,
        }


def _on(device: torch.device, chunk: Chunk) -> Chunk:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in chunk.items()}


def into_training(model: nn.Module, section: str) -> None:
    """All of the model but frozen batch norms, which keep the statistics that they came with, to the bit.

    One that trains would normalise by its chunk, take every chunk in twice, and end up another on each rank.

    Args:
        section: of the recipe, that the model comes from.

    Raises:
        UserError: a batch norm that trains, or has no statistics to keep.
    """
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            trains = [p.requires_grad for p in module.parameters()] or [True]
            if any(trains) or module.running_mean is None:
                raise UserError(
                    f"{section}: {name} is a batch norm, whose gradient depends on how the batch is cut into chunks; "
                    "take an architecture without (a ViT), or freeze it by optim.groups"
                )
            module.eval()
            module.forward = partial(_normalised, module, module.forward)  # type: ignore[method-assign]


def _normalised(norm: Any, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A batch norm's output, for which its statistics are rounded: torch takes them in the weights' type alone."""
    exact = norm.running_mean, norm.running_var
    try:
        norm.running_mean, norm.running_var = (kept.to(x.dtype) for kept in exact)
        return forward(x)
    finally:  # recomputed activations end a forward pass early
        norm.running_mean, norm.running_var = exact


def make_trainer(config: TrainConfig, data: Sequence[Source] | Shards, run: Path) -> Trainer:
    """Build the model, its engine and its loader; the process group is up already."""
    import deepspeed

    world = World.current()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    settings, tokenizer = deepspeed_config(config, world.size), run / "tokenizer"
    cut_up = settings["zero_optimization"]["stage"] == 3
    deferred = Deferred()
    members = config.loader.captions if isinstance(config.loader.captions, dict) else None
    sources = [Source(name="data", samples=data)] if isinstance(data, Shards) else data
    last = resumption.agreed(run, world)
    made_of = None if last is None else checkpoint.check(last).get("made_of")
    for first in (True, False):  # what is trained on the data (tokenizer, codebook) rank 0 makes, the others read
        if (world.rank == 0) == first:
            with deferred if cut_up else contextlib.nullcontext():
                family = build(config, tokenizer, lambda: every_caption(sources, members), made_of)
                if family.prepare is not None:
                    family.prepare(sources)
        if first:
            resumption.await_made(run, MADE, world)
        world.barrier()
    if config.activation_checkpointing:
        family.model.checkpoint_activations()
    groups = parameter_groups(family.model.named_parameters(), config.optim)
    into_training(family.model, config.family)
    adapters.round_matrices(family.model, dtype)
    optimizer, used = Sharded(groups, config.optim), zero.Used(family.model.named_parameters())
    # ZeRO-3 gathers a transformer block at a time: its hooks on every small module of a block cost more than they save.
    deepspeed.utils.set_z3_leaf_modules(family.model, sorted(family.model.blocks), raise_if_not_found=False)
    if cut_up:
        zero.ask_gradients(family.model, family.model.blocks)
        frozen = partition(family.model, deferred, settings, dtype)
    else:
        frozen = {n: (0, p.data.view(-1)) for n, p in family.model.named_parameters() if not p.requires_grad}
    engine, *_ = deepspeed.initialize(model=family.model, optimizer=optimizer, config=settings)
    if reduces_once(config, engine.zero_optimization_stage()):
        zero.sum_in_fp32(engine)
    optimizer.attach(zero.shards(engine), world)
    optimizer.frozen = zero.exact(engine, frozen)
    del frozen
    if engine.zero_optimization_stage() == 0:
        optimizer.clip = config.optim.gradient_clipping
    loader = Loader(
        sources,
        config.loader,
        family.image,
        family.encode_text,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        dtype=dtype,
        cache=run / "decoded" if config.loader.cache_decoded else None,
        extra=family.extra,
        mismatched=family.mismatched,
    )
    health = Health(max_ratio=config.optim.max_loss_ratio, max_skipped=config.optim.max_skipped)
    return Trainer(engine, optimizer, used, family, loader, config, world, health, last)


def train(config: TrainConfig, data: Mapping[str, str], run: Path) -> bool:
    """Train to the end, or to a SIGTERM; whether the end was reached.

    Raises:
        UserError: bad data or configuration; more broken samples than `loader.max_error_rate` allows.
    """
    stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    negatives = None if config.vlm2vec is None else config.vlm2vec.negatives
    trainer = make_trainer(config, open_sources(config.loader, data, run / COUNTS, negatives), run)
    budget = Budget(config.loader.max_error_rate, config.loader.error_window)
    world, recipe = trainer.world, as_dict(config)
    step, last = 0, trainer.last
    if last is not None:
        step = checkpoint.resume(trainer.engine, trainer.optimizer, last)
        before = checkpoint.check(last)
        trainer.health.restore(before["health"])
        budget.restore(before["budget"])
        if world.rank == 0:  # one rank goes on with what all have found, whatever their number was
            trainer.loader.holes.update(before["holes"])
    settle_retention(trainer)
    saver = checkpoint.Saver(run, config.keep_last, config.background_save)
    facts = {
        "config": recipe,
        "config_hash": config_hash(recipe),
        "made_of": trainer.family.made_of,
        "zero_stage": trainer.engine.zero_optimization_stage(),
        "retain": trainer.loader.retain,
    }
    with Sight(config, run, world, trainer.engine.device, trainer.flops, start=step) as sight:
        if world.rank == 0 and step:
            print(f"resuming after step {step}", flush=True)
        for chunks in sight.waiting(trainer.loader.batches(step, config.steps)):
            metrics = trainer.step(step, chunks)
            step += 1
            line = sight.step(
                step,
                metrics,
                draws=sum(int(chunk["draws"].sum()) for chunk in chunks),
                errors=trainer.loader.holes,
                seconds=trainer.loader.timers.seconds,
                groups=trainer.engine.optimizer.param_groups,
            )
            if line is not None:
                budget.check(step * config.loader.batch, line["errors_by_reason"])
            stopping = world.any(stop)
            if stopping or step % config.checkpoint_every == 0 or step == config.steps:
                past = {"health": trainer.health.state(), "budget": budget.state(), "holes": _holes(trainer)}
                now = {"samples": step * config.loader.batch, **past}
                saver.save(trainer.engine, trainer.optimizer, step, facts | now)
            if stopping and step < config.steps:
                break
        saver.wait()
    if step == config.steps:
        world.first(lambda: finish(trainer.family, config, run, step))
    return step == config.steps


def settle_retention(trainer: Trainer) -> None:
    """The retained samples: what the recipe says, what a first chunk shows to fit, or, resumed, what was chosen then.

    A resumed run has to sum in the same order as before, unless its ranks hold other parts of the batch.
    """
    config, loader, world = trainer.config.loader, trainer.loader, trainer.world
    if config.retain != "auto":
        return
    before = checkpoint.check(trainer.last) if trainer.last is not None else None
    if before is not None and before["world_size"] == world.size:
        loader.retain = before["retain"]
        return
    chunks = loader.of_each_kind()
    parameters = list(trainer.family.model.parameters())
    stage = trainer.engine.zero_optimization_stage()
    if stage < 2 or reduces_once(trainer.config, stage):  # a rank has all gradients, in fp32
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
    else:
        trained = sum(state.shard.flat.numel() for state in trainer.optimizer.states.values())
    forward = lambda chunk: trainer.forward(chunk, True)  # noqa: E731
    loader.retain = retention.choose(config, forward, chunks, parameters, world, coming=4 * trained)
    trainer.flops.forget()


def _holes(trainer: Trainer) -> dict[str, int]:
    """Broken samples of the run so far, over all ranks, by reason."""
    counts = trainer.world.sum(torch.tensor([float(trainer.loader.holes[r]) for r in REASONS], dtype=torch.float64))
    return {reason: int(n) for reason, n in zip(REASONS, counts.tolist()) if n}


def finish(family: Family, config: TrainConfig, run: Path, step: int) -> None:
    """Export the last checkpoint for people who take the model away, and close the run with its manifest."""
    from training.export import write
    from training.inference import rebuild

    facts = {"steps": step, "samples": step * config.loader.batch, "config": as_dict(config)}
    family = rebuild(config, run / "tokenizer", family.made_of)
    write(family, checkpoint.step_folder(run, step), run / "export", facts)
    for cache in run.glob("decoded.*"):
        cache.unlink()
    write_manifest(run / "manifest.json", facts)
