"""Where DeepSpeed keeps each parameter: the one file that looks into its ZeRO optimisers.

Under ZeRO a rank steps flat fp32 shards that know nothing of parameters. Three
things need to know which stretch of a shard belongs to which parameter: a
trust ratio per parameter (LAMB), leaving alone what a step did not use (Adam
counts steps per parameter), and checkpoints that another number of ranks, or
another stage, can read. All three read the same table, made here for every stage.

    stage 0     parameters are whole on each rank: a shard each
    stage 1, 2  the parameters of a group one after another, cut in equal parts, one part a rank
    stage 3     every parameter cut in equal parts; a rank's parts of a group one after another
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.distributed import World


@dataclass(frozen=True, slots=True)
class Stretch:
    """`size` elements of the parameter `name`, from its element `offset` on, that lie in a shard from `start` on."""

    name: str
    offset: int
    start: int
    size: int


@dataclass(slots=True)
class Shard:
    """What this rank steps of one parameter group (stage 3: of one sub-group).

    flat: fp32 master weights, the tensor that the optimiser is given · names: the group's parameters, the same list
    on every rank · stretches: this rank's part of them · split: whether other ranks hold the rest.
    """

    flat: torch.Tensor
    names: tuple[str, ...]
    stretches: list[Stretch]
    split: bool


def shards(engine: Any) -> list[Shard]:
    """The shards of this rank, in the order in which DeepSpeed steps them."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if stage == 0:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [Shard(p, (names[id(p)],), [Stretch(names[id(p)], 0, 0, p.numel())], False) for p in params]
    found = []
    if stage == 3:
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat):
            stretches = []
            for p in params:
                _, start, part = optimizer.grad_position[optimizer.get_param_id(p)]
                stretches += _part_of(names[id(p)], p, part, start)
            found.append(Shard(flat, tuple(names[id(p)] for p in params), stretches, True))
        return found
    # Stage 1 under bf16 is another class of DeepSpeed's, with the same table under other names.
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    for params, flat in zip(optimizer.bf16_groups if bf16 else optimizer.bit16_groups, flats):
        stretches = []
        for p in params:
            if (held := p._hp_mapping) is not None:
                inside, of = held.hp_fragment_address, held.lp_fragment_address
                stretches.append(Stretch(names[id(p)], of.start, inside.start, inside.numel))
        stretches.sort(key=lambda s: s.start)
        found.append(Shard(flat, tuple(names[id(p)] for p in params), stretches, True))
    return found


def _part_of(name: str, parameter: Any, part: int, start: int) -> list[Stretch]:
    """This rank's part of a parameter that ZeRO-3 cut into parts of `part` elements; the last ones may be empty."""
    offset = World.current().rank * part
    size = min(part, parameter.ds_numel - offset)
    return [Stretch(name, offset, start, size)] if size > 0 else []


def frozen(engine: Any, everywhere: bool = False) -> dict[Stretch, torch.Tensor]:
    """Flat views of the parameters that no optimiser holds: what this rank has to save (together the ranks save all),
    or, with `everywhere`, all that it holds."""
    world, kept = World.current(), {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            for stretch in _part_of(name, p, p.partition_numel(), 0):
                kept[stretch] = p.ds_tensor.data.view(-1)[: stretch.size]
        elif everywhere or world.rank == 0:
            kept[Stretch(name, 0, 0, p.numel())] = p.data.view(-1)
    return kept


def exact(engine: Any, before: Mapping[str, tuple[int, torch.Tensor]]) -> dict[Stretch, torch.Tensor]:
    """Of what `frozen` gives: the values `before` the engine rounded them, as (first element, elements that follow) by
    the parameter's name. A checkpoint keeps these, so that bf16 training does not change a frozen weight."""
    found = {}
    for stretch, values in frozen(engine).items():
        first, whole = before.get(stretch.name, (0, values))
        if values.dtype != whole.dtype:
            found[stretch] = whole[stretch.offset - first :][: stretch.size].cpu().clone()
    return found


def shapes(engine: Any) -> dict[str, list[int]]:
    """The whole shape of every parameter, by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def ask_gradients(model: nn.Module, blocks: Iterable[str]) -> None:
    """Have the inputs of blocks that train ask for a gradient, where nothing before them does.

    DeepSpeed takes a leaf module's gradients for ready when those of its inputs are, and at once where no input asks
    for one: an adapter in the first block above frozen embeddings would be reduced before its gradient is there.
    """
    names = set(blocks)
    for module in model.modules():
        if type(module).__name__ in names and any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_asking)


def _asking(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """states, ... -> the same, the states asking for a gradient."""
    asked = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if asked or not inputs or not torch.is_grad_enabled():
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def begin_step(engine: Any) -> None:
    """Stage 3 keeps the last gradients of parameters that a step does not use, and adds to them: clear them."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def sum_in_fp32(engine: Any) -> None:
    """Have autograd sum the gradients of bf16 parameters in fp32, and stage 2 keep them so on the way to the others."""
    for p in engine.module.parameters():
        if p.requires_grad:
            p.grad_dtype = torch.float32
    if engine.zero_optimization_stage() == 2:
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


@torch.no_grad()
def publish(engine: Any) -> None:
    """Bring changed master weights to the parameters that the model computes with."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:  # small ones are kept whole between steps
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()


class Used:
    """Which parameters the backward passes of a step reach, on any rank.

    torch leaves a parameter without gradient alone; ZeRO-1 and 2 would step it with zeros (its moments and its weight
    decay still move it), ZeRO-3 with an old gradient. The optimiser is told instead.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.names: list[str] = []
        self._here = torch.zeros(0)
        for name, p in named:
            if p.requires_grad:
                p.register_hook(self._mark(len(self.names)))
                self.names.append(name)
        self._here = torch.zeros(len(self.names))

    def _mark(self, number: int) -> Any:
        def reached(gradient: torch.Tensor) -> None:
            self._here[number] = 1.0

        return reached

    def agree(self, world: World) -> frozenset[str]:
        """The names that any rank has reached since the last call."""
        everywhere = world.max(self._here.clone())
        self._here.zero_()
        return frozenset(self.names[i] for i in everywhere.nonzero().flatten().tolist())


def masters(shards_of_rank: Iterable[Shard], names: Sequence[str], world: World) -> dict[str, torch.Tensor]:
    """The fp32 master values [1] of one-element parameters, by name."""
    values = torch.zeros(len(names))
    for shard in shards_of_rank:
        for s in shard.stretches:
            if s.name in names and (shard.split or world.rank == 0):
                values[names.index(s.name)] = shard.flat.detach().view(-1)[s.start].float().cpu()
    return dict(zip(names, world.sum(values).split(1)))
