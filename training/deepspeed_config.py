"""The recipe's DeepSpeed file, checked key by key, with what follows from the recipe filled in.

DeepSpeed drops what it does not know at the top level and in some sections, and
what is left at "auto"; here all of it is refused. What a section's keys are,
DeepSpeed's own classes say. ds_configs/ holds resolved files; batch sizes,
precision, clipping, optimiser and schedule are the recipe's, so that one file
serves every recipe.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curation.errors import UserError, one_line
from training.config import ROOT, TrainConfig

SCALARS: dict[str, tuple[type, ...]] = {
    "communication_data_type": (str,),
    "dump_state": (bool,),
    "gradient_predivide_factor": (int, float),
    "memory_breakdown": (bool,),
    "prescale_gradients": (bool,),
    "steps_per_print": (int,),
    "wall_clock_breakdown": (bool,),
}
SECTIONS = ("comms_logger", "csv_monitor", "flops_profiler", "tensorboard", "wandb", "zero_optimization")
"""Top-level keys of DeepSpeed's that mean something here: single values, and sections with keys of their own."""

DECIDED = {
    "activation_checkpointing", "amp", "bf16", "checkpoint", "data_types", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "managed_gradient_accumulation", "optimizer", "scheduler", "train_batch_size",
    "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Those that the recipe decides."""

COMPUTING = ("communication_data_type", "gradient_predivide_factor", "prescale_gradients", "zero_optimization")
"""Those that what a run computes depends on; the rest say what it reports."""


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Everything that `deepspeed.initialize` is given; the stage is in it, whether the file names it or not.

    Raises:
        UserError: no such file, no JSON; an unknown key or value, one that the recipe decides or leaves at "auto"; a
            combination that DeepSpeed does not implement; a batch that does not divide.
    """
    path, settings = _read(config)
    if clash := sorted(DECIDED & set(settings)):
        raise UserError(f"deepspeed: {path} sets {', '.join(clash)}, which the recipe decides; remove them there")
    if unknown := sorted(set(settings) - {*SCALARS, *SECTIONS}):
        raise UserError(f"deepspeed: {path} sets {', '.join(unknown)}, which DeepSpeed would drop; mend or remove them")
    if automatic := sorted(name for name, value in _values(settings) if value == "auto"):
        raise UserError(f'deepspeed: {path} leaves {", ".join(automatic)} at "auto", which is dropped; write the value')
    for name in SCALARS.keys() & settings.keys():
        if type(settings[name]) not in SCALARS[name]:
            kinds = " or ".join(kind.__name__ for kind in SCALARS[name])
            raise UserError(f"deepspeed: {path}: {name}: {settings[name]!r} is no {kinds}; write one")
    if (sent := settings.get("communication_data_type", "fp32")) not in ("fp32", "bf16", "fp16"):
        raise UserError(f"deepspeed: {path}: communication_data_type: no {sent!r}; take fp32, bf16 or fp16")
    if config.loader.batch % world_size:
        raise UserError(f"loader.batch: {config.loader.batch} does not divide over {world_size} ranks; take a multiple")
    stage = _check_sections(path, settings, config)
    settings = settings | {"zero_optimization": settings.get("zero_optimization", {}) | {"stage": stage}}
    once = reduces_once(config, stage)
    if once:
        settings = {"communication_data_type": "fp32"} | settings  # in bf16 the sums would lose what they kept
    return settings | {
        "train_micro_batch_size_per_gpu": config.loader.batch // world_size,
        "gradient_accumulation_steps": 1,
        # backward() only accumulates and step() is the boundary, except where `coalesce_grad_reduction` says so.
        "managed_gradient_accumulation": once,
        # Without ZeRO our optimiser clips: DeepSpeed would keep the norm to itself.
        "gradient_clipping": config.optim.gradient_clipping if stage > 0 else 0.0,
        # Steps whose gradient is not finite are dropped at every stage, as ZeRO-3 does by itself.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Ours (training/optim.py), which knows ZeRO's shards.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def computing(config: TrainConfig) -> dict[str, Any]:
    """What a run's identity holds of its file, wherever that lies and however many ranks there are.

    Raises:
        UserError: no such file, no JSON.
    """
    _, settings = _read(config)
    return {name: settings[name] for name in COMPUTING if name in settings}


def _read(config: TrainConfig) -> tuple[Path, dict[str, Any]]:
    path = Path(config.deepspeed)
    path = path if path.exists() else ROOT / config.deepspeed
    try:
        settings = json.loads(path.read_text(), object_pairs_hook=_once)
    except FileNotFoundError:
        raise UserError(
            f"deepspeed: {config.deepspeed} does not exist; ds_configs/ has zero0, zero1, zero2, zero3, zero3_offload"
        ) from None
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is not JSON ({error}); mend it") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed: {path} is no JSON object; write {{...}}")
    return path, settings


def reduces_once(config: TrainConfig, stage: int) -> bool:
    """Whether chunks are summed on their rank first; stages 0 and 1 reduce once a step in any case."""
    return stage >= 2 and config.reduce_gradients == "step"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)} is there twice")
    return found


def _values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no section, or an empty one."""
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _values(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _check_sections(path: Path, settings: Mapping[str, Any], config: TrainConfig) -> int:
    """The ZeRO stage."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds: dict[str, Any] = {
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }
    for name in sorted(settings.keys() & SECTIONS):
        if not isinstance(settings[name], dict):
            raise UserError(f"deepspeed: {path}: {name}: {settings[name]!r} is no section; write {{...}}")
        # `strict` is an argument of DeepSpeed's classes: no key, and yet not refused by them.
        known = vars(DeepSpeedFlopsProfilerConfig({})) if name == "flops_profiler" else None
        for key, _ in _values(settings[name]):
            if key.split(".")[-1] == "strict" or (known is not None and key not in known):
                raise UserError(f"deepspeed: {path}: {name}.{key}: DeepSpeed has no such key; mend or remove it")
        if name in kinds:
            _parsed(path, name, settings[name], kinds[name])
    zero = _parsed(path, "zero_optimization", settings.get("zero_optimization", {}), DeepSpeedZeroConfig)
    for why, holds in refusals(zero, settings, config).items():
        if holds:
            raise UserError(f"deepspeed: {path}: zero_optimization: {why}")
    return int(zero.stage)


def _parsed(path: Path, name: str, section: dict[str, Any], kind: Any) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        what = "DeepSpeed has no such key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"deepspeed: {path}: {where}: {what}; mend or remove it") from None
    except (AssertionError, TypeError, ValueError) as error:  # of deprecated keys beside those that replace them
        raise UserError(f"deepspeed: {path}: {name}: {one_line(error, None)}; mend it") from None


def refusals(zero: Any, settings: Mapping[str, Any], config: TrainConfig) -> dict[str, bool]:
    """{what is refused and its mend: whether it is so here}, of a `DeepSpeedZeroConfig` beside the other settings.

    Each is refused by DeepSpeed itself, deep in a run's start and in its own words, or is silently wrong.
    """
    stage, optimizer, param = int(zero.stage), zero.offload_optimizer, zero.offload_param
    scaled = settings.get("prescale_gradients", False) or settings.get("gradient_predivide_factor", 1.0) != 1.0
    return {
        "stage 0 keeps no fp32 master weights under bf16: take stage 1, or precision: fp32": stage == 0
        and config.precision == "bf16",
        "overlap_comm with several backward passes a step needs stage 2 or 3": stage < 2 and bool(zero.overlap_comm),
        "offload_optimizer.device: nvme leaves no shard to step; take cpu": bool(
            optimizer and str(optimizer.device) == "nvme"
        ),
        "offload_param.device: nvme leaves nothing to save; take cpu": bool(param and str(param.device) == "nvme"),
        "offload_optimizer.ratio below 1 needs DeepSpeed's own Adam; leave it at 1": bool(
            optimizer and optimizer.ratio < 1
        ),
        "offload_optimizer.super_offload needs DeepSpeed's own Adam; leave it out": bool(
            optimizer and optimizer.super_offload
        ),
        "zenflow needs DeepSpeed's own Adam; leave it out": zero.zenflow is not None,
        "zero_quantized_nontrainable_weights cannot be saved; leave it out": zero.zero_quantized_nontrainable_weights,
        "zero_quantized_weights computes with rounded weights, which nothing here expects; leave it out": (
            zero.zero_quantized_weights
        ),
        "zero_quantized_gradients rounds what the chunks sum in fp32; leave it out": zero.zero_quantized_gradients,
        "zero_hpz_partition_size keeps second copies that a resumed checkpoint does not reach; leave it at 1": (
            zero.zero_hpz_partition_size != 1
        ),
        # Its table of what lies where in a shard (`_hp_mapping`) keeps the old order: every name would be wrong.
        "round_robin_gradients reorders the shards that checkpoints and optimisers find parameters in; leave it out": (
            zero.round_robin_gradients
        ),
        "legacy_stage1 is no longer in DeepSpeed; leave it out": zero.legacy_stage1,
        # `zero.ask_gradients` knows the families' blocks alone.
        "leaf_module is the family's to say, or gradients are reduced before they are there; leave it out": (
            "leaf_module" in zero.model_fields_set
        ),
        "stage3_module_granularity_threshold makes leaves of other modules than the family's; leave it at 0": (
            zero.module_granularity_threshold != 0
        ),
        "allgather_bucket_size has to be even and above 0": stage in (1, 2)
        and (zero.allgather_bucket_size % 2 == 1 or zero.allgather_bucket_size == 0),
        "compute_grad_norm: false leaves no norm to judge a step by; leave it out": not zero.compute_grad_norm,
        "offload_param needs stage 3": stage < 3 and param is not None,
        "offload_optimizer needs stage 3 here": stage < 3 and optimizer is not None,
        "prescale_gradients and gradient_predivide_factor need reduce_scatter: false; leave them out": stage >= 2
        and zero.reduce_scatter
        and scaled,
        "stage 3 cannot cut up qlora's packed weights; take stage 2": stage == 3
        and config.adapter is not None
        and config.adapter.kind == "qlora",
    }
