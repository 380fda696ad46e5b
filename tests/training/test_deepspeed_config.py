"""A recipe's DeepSpeed file: what DeepSpeed would drop, guess or not do is refused in one line that names the key.

DeepSpeed itself says what a key is: by what its config reads, and by the fields of its classes.
"""

import functools
import json
from dataclasses import replace
from typing import ClassVar

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from curation.errors import UserError
from tests.training.conftest import tiny_config
from training.deepspeed_config import DECIDED, SCALARS, SECTIONS, deepspeed_config, refusals

CLASSES = {
    ("comms_logger",): CommsLoggerConfig,
    ("csv_monitor",): CSVConfig,
    ("tensorboard",): TensorBoardConfig,
    ("wandb",): WandbConfig,
    ("zero_optimization",): DeepSpeedZeroConfig,
    ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
    ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
}


recipe = functools.cache(tiny_config)


@pytest.fixture
def settled(tmp_path):
    """(what the file says, recipe overrides) -> what DeepSpeed would be given"""

    def settle(said, *overrides, ranks=2):
        file = tmp_path / "ds.json"
        file.write_text(said if isinstance(said, str) else json.dumps(said))
        return deepspeed_config(replace(recipe(*overrides), deepspeed=str(file)), ranks)

    return settle


def refused(settled, named, said, *overrides):
    with pytest.raises(UserError, match=named) as error:
        settled(said, *overrides)
    assert "\n" not in str(error.value) and str(error.value).startswith("deepspeed: ")


class Read(dict):
    """Notes the keys that are asked for."""

    asked: ClassVar[set] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


def test_every_key_that_is_let_through_is_read_by_deepspeed(settled):
    """And so is every one that we fill in; what is neither ours nor theirs is refused."""
    filled = settled({})
    DeepSpeedConfig(Read({**filled, "train_micro_batch_size_per_gpu": 1}))
    assert {*SCALARS, *SECTIONS, *filled} <= Read.asked
    assert set(filled) - {*SCALARS, *SECTIONS} <= DECIDED
    assert not DECIDED & {*SCALARS, *SECTIONS}
    for key in ("zero_optimisation", "monitor_config", "aio", "disable_allgather", "sparse_gradients"):
        refused(settled, f"sets {key}, which DeepSpeed would drop", {key: {}})
    for key in DECIDED:
        refused(settled, f"sets {key}, which the recipe decides", {key: 1})


@pytest.mark.parametrize("where", CLASSES, ids=".".join)
def test_the_keys_of_a_section_are_those_of_deepspeed_s_class(settled, where):
    kind, stage = CLASSES[where], {"zero_optimization": {"stage": 3, "overlap_comm": False}}
    for key in ("devise", "Enabled", "strict"):
        section = {key: True}
        for name in reversed(where):
            section = {name: section}
        refused(settled, rf"ds\.json: {'.'.join([*where, key])}: DeepSpeed has no such key; mend", section)
    for name, field in kind.model_fields.items():  # their defaults, where they have one to write down
        value = field.get_default(call_default_factory=True)
        if not isinstance(value, bool | int | float | str | list) or (field.json_schema_extra or {}).get("deprecated"):
            continue
        section = {field.alias or name: value if not hasattr(value, "value") else value.value}
        if len(where) == 2:
            settled({"zero_optimization": {**stage["zero_optimization"], where[1]: {"device": "cpu", **section}}})
        elif where[0] == "zero_optimization":
            settled({where[0]: {**stage[where[0]], **section, "stage": 3}})
        else:
            settled({**stage, where[0]: section})


def test_sections_that_deepspeed_reads_key_by_key_are_checked_too(settled):
    settled({"zero_optimization": {"stage": 3}, "flops_profiler": {"enabled": True, "output_file": "x"}})
    refused(settled, r"ds\.json: flops_profiler\.profil_step: DeepSpeed has no such key", {
        "flops_profiler": {"enabled": True, "profil_step": 2}
    })  # fmt: skip


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("{", "not JSON"),
        ("[]", "is no JSON object"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "steps_per_print is there twice"),
        ({"zero_optimization": 3}, "zero_optimization: 3 is no section"),
        ({"tensorboard": True}, "tensorboard: True is no section"),
        ({"steps_per_print": "often"}, "steps_per_print: 'often' is no int"),
        ({"steps_per_print": True}, "steps_per_print: True is no int"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: 1 is no bool"),
        ({"communication_data_type": "fp8"}, "communication_data_type: no 'fp8'; take fp32"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage: .*; mend"),
        ({"zero_optimization": {"stage": "three"}}, r"zero_optimization\.stage: .*; mend"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"zero_optimization\.reduce_bucket_size: .*; mend"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, r"offload_param\.device: .*; mend"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, r"zero_optimization\.offload_param: .*; mend"),
        ({"zero_optimization": {"stage": "auto"}}, 'leaves zero_optimization.stage at "auto"'),
        ({"steps_per_print": "auto"}, 'leaves steps_per_print at "auto"'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": "auto"}}},
            r'leaves zero_optimization\.offload_optimizer\.ratio at "auto"',
        ),
    ],
)
def test_what_cannot_be_meant_is_named(settled, said, named):
    refused(settled, named, said)


QLORA = ("--adapter", "{kind: qlora, module: llm}")
COMBINATIONS = {
    "stage 0 keeps no fp32 master weights": ({"stage": 0}, {}, ("--precision", "bf16")),
    "overlap_comm with several": ({"stage": 1, "overlap_comm": True}, {}, ()),
    "offload_optimizer.device: nvme": ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, ()),
    "offload_param.device: nvme": ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, ()),
    "offload_optimizer.ratio": ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, ()),
    "offload_optimizer.super_offload": (
        {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, {}, (),
    ),
    "zenflow": ({"stage": 2, "overlap_comm": False, "zenflow": {}}, {}, ()),
    "zero_quantized_nontrainable_weights": ({"stage": 3, "zero_quantized_nontrainable_weights": True}, {}, ()),
    "compute_grad_norm: false": ({"stage": 2, "overlap_comm": False, "compute_grad_norm": False}, {}, ()),
    "offload_param needs stage 3": ({"stage": 2, "overlap_comm": False, "offload_param": {"device": "cpu"}}, {}, ()),
    "offload_optimizer needs stage 3": (
        {"stage": 1, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}, {}, (),
    ),
    "zero_quantized_weights": ({"stage": 3, "zero_quantized_weights": True}, {}, ()),
    "zero_quantized_gradients": ({"stage": 3, "zero_quantized_gradients": True}, {}, ()),
    "zero_hpz_partition_size": ({"stage": 3, "zero_hpz_partition_size": 2}, {}, ()),
    "round_robin_gradients": ({"stage": 2, "overlap_comm": False, "round_robin_gradients": True}, {}, ()),
    "legacy_stage1": ({"stage": 1, "legacy_stage1": True}, {}, ()),
    "leaf_module": ({"stage": 3, "leaf_module": {"names": ["towers"]}}, {}, ()),
    "stage3_module_granularity": ({"stage": 3, "stage3_module_granularity_threshold": 10}, {}, ()),
    "allgather_bucket_size": ({"stage": 2, "overlap_comm": False, "allgather_bucket_size": 3}, {}, ()),
    "prescale_gradients and": ({"stage": 3}, {"prescale_gradients": True}, ()),
    "stage 3 cannot cut up qlora": ({"stage": 3}, {}, QLORA),
}  # fmt: skip
"""What each refusal begins with: a file and a recipe of which it is the only thing wrong."""


@pytest.mark.parametrize("begins", COMBINATIONS)
def test_what_deepspeed_does_not_do_is_refused(settled, begins):
    zero, beside, overrides = COMBINATIONS[begins]
    refused(settled, f"zero_optimization: {begins}", {"zero_optimization": zero, **beside}, *overrides)
    whole = refusals(DeepSpeedZeroConfig(**zero), beside, recipe(*overrides))
    assert [why.startswith(begins) for why, holds in whole.items() if holds] == [True]


def test_every_refusal_has_its_case(settled):
    known = refusals(DeepSpeedZeroConfig(), {}, recipe())
    assert len(known) == len(COMBINATIONS) and not any(known.values())
    assert all(sum(why.startswith(begins) for begins in COMBINATIONS) == 1 for why in known)
    for predivided in ({"gradient_predivide_factor": 2.0}, {"gradient_predivide_factor": 1}):
        said = {"zero_optimization": {"stage": 2, "overlap_comm": False}, **predivided}
        if predivided["gradient_predivide_factor"] == 1:
            settled(said)
        else:
            refused(settled, "prescale_gradients and gradient_predivide_factor", said)


@pytest.mark.parametrize("said", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_the_stage_is_there_whether_the_file_names_it_or_not(settled, said):
    assert settled(said, "--precision", "fp32")["zero_optimization"] == {"stage": 0}


def test_a_missing_file_and_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"deepspeed: none\.json does not exist; ds_configs/ has"):
        deepspeed_config(replace(recipe(), deepspeed="none.json"), 2)
    with pytest.raises(UserError, match=r"loader\.batch: 32 does not divide over 3 ranks"):
        deepspeed_config(recipe(), 3)
