"""Optimisers that know which parameter each stretch of a ZeRO shard belongs to, parameter groups, and the schedule.

AdamW and LAMB see a rank's flat shards (training/zero.py). They count steps per
parameter and leave alone what a step did not use, as torch does with a
parameter without gradient; LAMB takes its trust ratio over the whole
parameter, by one small all-reduce of norms per shard.

A schedule that is a function of the step needs no state in the checkpoint:
step n has the same rate whether the run was resumed or not.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.adamw import adamw

from curation.errors import UserError
from training.config import OptimConfig
from training.distributed import World
from training.zero import Shard, Stretch


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal learning rate and weight decay; frozen parameters get `requires_grad=False` and no group.

    Raises:
        UserError: a pattern that matches no parameter, or whose decay reaches none; a parameter that two match; nothing
            left to train.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used: set[str] = set()
    decayed: set[str] = set()
    for name, parameter in named:
        rules = [g for g in config.groups if re.search(g.pattern, name)]
        if len(rules) > 1:
            both = " and ".join(repr(rule.pattern) for rule in rules[:2])
            raise UserError(f"optim.groups: {name} is matched by {both}; narrow one of them")
        rule = rules[0] if rules else None
        lr, decay = config.lr, config.weight_decay
        if rule is not None:
            used.add(rule.pattern)
            if rule.frozen:
                parameter.requires_grad_(False)
                continue
            lr = config.lr if rule.lr is None else rule.lr
            decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            decay = 0.0
        elif rule is not None:
            decayed.add(rule.pattern)
        groups.setdefault((lr, decay), []).append(parameter)
    for rule in config.groups:
        if rule.pattern not in used:
            raise UserError(f"optim.groups: the pattern {rule.pattern!r} matches no parameter; mend or remove it")
        if rule.weight_decay and rule.pattern not in decayed:
            raise UserError(
                f"optim.groups: {rule.pattern!r} decays nothing: biases, norms, the temperature and what is frozen "
                "never are; remove its weight_decay, or match matrices"
            )
    if not groups:
        raise UserError("optim.groups: every parameter is frozen; leave one group to train")
    return [{"params": p, "lr": lr, "base_lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class State:
    """What an optimiser keeps for a shard: fp32 moments as long as the shard, and steps taken by each stretch."""

    shard: Shard
    moments: dict[str, torch.Tensor]
    steps: list[int] = field(default_factory=list)

    @classmethod
    def fresh(cls, shard: Shard) -> "State":
        flat = shard.flat.detach().view(-1)
        return cls(shard, {name: torch.zeros_like(flat) for name in MOMENTS}, [0] * len(shard.stretches))

    def runs(self, used: frozenset[str] | None) -> Iterator[tuple[int, int, int]]:
        """(start, end, steps taken) of neighbouring stretches in step with each other, of parameters in `used`."""
        start = end = steps = -1
        for stretch, taken in zip(self.shard.stretches, self.steps):
            if used is not None and stretch.name not in used:
                continue
            if stretch.start == end and taken == steps:
                end += stretch.size
                continue
            if end > start:
                yield start, end, steps
            start, end, steps = stretch.start, stretch.start + stretch.size, taken
        if end > start:
            yield start, end, steps

    def count(self, used: frozenset[str] | None) -> None:
        for number, stretch in enumerate(self.shard.stretches):
            self.steps[number] += used is None or stretch.name in used


class Held(NamedTuple):
    """A shard to be stepped, flat."""

    state: State
    weights: torch.Tensor
    gradient: torch.Tensor


class Sharded(torch.optim.Optimizer):
    """AdamW or LAMB over ZeRO shards; does nothing until `attach` has told it what the shards hold.

    (DeepSpeed steps an optimiser once with zero gradients while it starts, which must not count.)

    Args:
        groups: as `parameter_groups` gives them.
        used: set before each step: the parameters to be stepped; None means all.
        clip: set without ZeRO, whose own optimisers clip and drop what is not finite: the largest norm of the gradient
            (0 = any). `norm` is then the last step's.
        frozen: fp32 values of what no step moves, as this rank saves them, where the engine holds them in less.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self.config = config
        self.states: dict[int, State] = {}
        self.used: frozenset[str] | None = None
        self.clip: float | None = None
        self.frozen: dict[Stretch, torch.Tensor] = {}
        self.norm = math.nan
        self.world = World()

    def attach(self, shards: list[Shard], world: World) -> None:
        self.states = {id(shard.flat): State.fresh(shard) for shard in shards}
        self.world = world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.clip is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self.norm):
                return
            if 0 < self.clip < self.norm:
                torch._foreach_mul_(gradients, self.clip / (self.norm + 1e-6))
        for group in self.param_groups:
            held = [
                Held(state, p.detach().view(-1), p.grad.detach().view(-1))
                for p in group["params"]
                if (state := self.states.get(id(p))) is not None and p.grad is not None
            ]
            if self.config.name == "adamw":
                self._adamw(held, group)
            else:
                for one in held:
                    self._lamb(*one, group)
            for state, *_ in held:
                state.count(self.used)

    def _adamw(self, held: list[Held], group: dict[str, Any]) -> None:
        """Loshchilov & Hutter 2019, by torch's own fused kernel: one call for all shards of a group."""
        beta1, beta2 = self.config.betas
        lists: list[list[torch.Tensor]] = [[], [], [], []]  # weights, gradients and both moments, a run each
        steps: list[float] = []
        for state, weights, gradient in held:
            for a, b, taken in state.runs(self.used):
                steps.append(float(taken))
                for into, x in zip(lists, (weights, gradient, *(state.moments[k] for k in MOMENTS))):
                    into.append(x[a:b])
        settings: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": self.config.eps}
        settings |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "fused": True}
        if steps:
            w, g, m, v = lists
            adamw(w, g, m, v, [], list(torch.tensor(steps, device=w[0].device).unbind()), **settings)

    def _lamb(self, state: State, weights: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        """You et al. 2020, Algorithm 2, with phi the identity. As in its published code, parameters without weight
        decay (biases, norms) keep a ratio of 1."""
        beta1, beta2 = self.config.betas
        update = torch.zeros_like(weights)
        for a, b, taken in state.runs(self.used):
            g, (m, v) = gradient[a:b], (state.moments[name][a:b] for name in MOMENTS)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            spread = (v / (1 - beta2 ** (taken + 1))).sqrt_().add_(self.config.eps)
            torch.div(m, spread.mul_(1 - beta1 ** (taken + 1)), out=update[a:b])
            update[a:b].add_(weights[a:b], alpha=group["weight_decay"])
        ratio = self._trust_ratios(state.shard, weights, update) if group["weight_decay"] else None
        for s in state.shard.stretches:
            if self.used is None or s.name in self.used:
                part = slice(s.start, s.start + s.size)
                weights[part].add_(update[part], alpha=-group["lr"] * (ratio[s.name] if ratio else 1.0))

    def _trust_ratios(self, shard: Shard, weights: torch.Tensor, update: torch.Tensor) -> dict[str, float]:
        """|p| / |update| over each whole parameter, whatever ranks hold it; 1 where either is 0."""
        row = {name: number for number, name in enumerate(shard.names)}
        squares = torch.zeros(len(row), 2, dtype=torch.float64, device=weights.device)  # a GPU is asked once, for all
        for s in shard.stretches:
            part = slice(s.start, s.start + s.size)
            squares[row[s.name]] += torch.stack([x[part].norm().double() ** 2 for x in (weights, update)])
        if shard.split:
            squares = self.world.sum(squares)
        both = (squares > 0).all(1)
        ratios = torch.where(both, (squares[:, 0] / squares[:, 1].clamp(min=1e-300)).sqrt(), 1.0)
        return dict(zip(shard.names, ratios.tolist()))


def factor(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the base learning rate at `step` (from 0): linear warm-up, then the schedule down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Any, share: float) -> None:
    """`optimizer` is torch's or DeepSpeed's: both show `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
