"""The recipe's DeepSpeed file, checked key by key, with what follows from the recipe filled in.

DeepSpeed drops what it does not know at the top level and what is left at
"auto"; here both are refused. ds_configs/ holds resolved files; batch sizes,
precision, clipping, optimiser and schedule are the recipe's, so that one file
serves every recipe.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curation.errors import UserError
from training.config import ROOT, TrainConfig

THEIRS = {
    "activation_checkpointing", "aio", "comms_logger", "communication_data_type", "csv_monitor", "disable_allgather",
    "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "monitor_config",
    "prescale_gradients", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb", "zero_optimization",
}  # fmt: skip
"""Top-level keys of DeepSpeed's documentation that mean something here."""

DECIDED = {
    "amp", "bf16", "checkpoint", "data_types", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "managed_gradient_accumulation", "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Those that the recipe decides."""


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Everything that `deepspeed.initialize` is given.

    Raises:
        UserError: no such file, no JSON; an unknown key or value, one that the recipe decides or leaves at "auto"; a
            combination that DeepSpeed does not implement; a batch that does not divide.
    """
    path = Path(config.deepspeed)
    path = path if path.exists() else ROOT / config.deepspeed
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"deepspeed: {config.deepspeed} does not exist; ds_configs/ has zero0, zero1, zero2, zero3, zero3_offload"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed: {path} is not JSON ({error}); mend it") from None
    if clash := sorted(DECIDED & set(settings)):
        raise UserError(f"deepspeed: {path} sets {', '.join(clash)}, which the recipe decides; remove them there")
    if unknown := sorted(set(settings) - THEIRS):
        raise UserError(f"deepspeed: {path} sets {', '.join(unknown)}, which DeepSpeed would drop; mend or remove them")
    if automatic := sorted(_automatic(settings)):
        raise UserError(f'deepspeed: {path} leaves {", ".join(automatic)} at "auto", which is dropped; write the value')
    if config.loader.batch % world_size:
        raise UserError(f"loader.batch: {config.loader.batch} does not divide over {world_size} ranks; take a multiple")
    stage = _check_zero(path, settings.get("zero_optimization", {}), config)
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


def reduces_once(config: TrainConfig, stage: int) -> bool:
    """Whether chunks are summed on their rank first; stages 0 and 1 reduce once a step in any case."""
    return stage >= 2 and config.reduce_gradients == "step"


def _automatic(value: Any, name: str = "") -> Iterator[str]:
    if value == "auto":
        yield name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _automatic(inner, f"{name}.{key}" if name else key)


def _check_zero(path: Path, zero: dict[str, Any], config: TrainConfig) -> int:
    """The stage."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        parsed = DeepSpeedZeroConfig(**zero)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"deepspeed: {path}: {where}: {first['msg']}; mend or remove it") from None
    stage = int(parsed.stage)
    # Each of these is refused by DeepSpeed itself, deep in a run's start and in its own words, or is silently wrong.
    refused = {
        "stage 0 keeps no fp32 master weights under bf16: take stage 1, or precision: fp32": stage == 0
        and config.precision == "bf16",
        "overlap_comm with several backward passes a step needs stage 2 or 3": stage < 2 and bool(parsed.overlap_comm),
        "offload_optimizer.device: nvme leaves no shard to step; take cpu": bool(
            parsed.offload_optimizer and str(parsed.offload_optimizer.device) == "nvme"
        ),
        "offload_param.device: nvme leaves nothing to save; take cpu": bool(
            parsed.offload_param and str(parsed.offload_param.device) == "nvme"
        ),
        "offload_optimizer.ratio below 1 needs DeepSpeed's own Adam; leave it at 1": bool(
            parsed.offload_optimizer and parsed.offload_optimizer.ratio < 1
        ),
        "zero_quantized_nontrainable_weights cannot be saved; leave it out": parsed.zero_quantized_nontrainable_weights,
        "compute_grad_norm: false leaves no norm to judge a step by; leave it out": not parsed.compute_grad_norm,
        "offload_param needs stage 3": stage < 3 and parsed.offload_param is not None,
        "offload_optimizer needs stage 3 here": stage < 3 and parsed.offload_optimizer is not None,
        "stage 3 cannot cut up qlora's packed weights; take stage 2": stage == 3
        and config.adapter is not None
        and config.adapter.kind == "qlora",
    }
    for why, holds in refused.items():
        if holds:
            raise UserError(f"deepspeed: {path}: zero_optimization: {why}")
    return stage
