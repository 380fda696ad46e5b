"""Every ZeRO stage and number of ranks against one plain torch process: optimisers, parameters left alone, checkpoints.

The plain side is torch.optim.AdamW, and LAMB as its paper's Algorithm 2 says, on the same model without DeepSpeed:
parameters that a step does not use have no gradient there, and torch leaves them alone. Nor does it take the step that
the ranks leave out, since its gradient is no number (rank_zero.py).
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from curation.errors import UserError
from tests.training.conftest import tiny_config
from tests.training.rank_zero import CLIP, HALF, STEPS, Toy, optim
from tests.training.ranks import launch
from training import checkpoint
from training.deepspeed_config import refusals
from training.optim import factor, parameter_groups

FLOAT32 = ["0", "1", "2", "3", "3-offload"]
BF16 = ["1-bf16", "2-bf16", "3-bf16", "3-offload-bf16"]


class PlainLamb(torch.optim.Optimizer):
    """You et al. 2020, Algorithm 2, parameter by parameter; a ratio of 1 without weight decay."""

    def __init__(self, groups, config):
        super().__init__(groups, {"betas": config.betas, "eps": config.eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, (b1, b2) = self.state[p], group["betas"]
                m, v = (state.setdefault(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq"))
                t = state["step"] = state.get("step", 0) + 1
                m.copy_(b1 * m + (1 - b1) * p.grad)
                v.copy_(b2 * v + (1 - b2) * p.grad**2)
                r = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
                ratio = p.norm() / r.norm() if group["weight_decay"] and p.norm() > 0 and r.norm() > 0 else 1.0
                p.sub_(group["lr"] * ratio * r)


def plain(name: str):
    """(model, optimiser) after the steps, in one process without DeepSpeed."""
    model, config = Toy(), optim(name)
    groups = parameter_groups(model.named_parameters(), config)
    adamw = {"betas": config.betas, "eps": config.eps}
    optimizer = torch.optim.AdamW(groups, **adamw) if name == "adamw" else PlainLamb(groups, config)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step, STEPS, config)
        model.zero_grad(set_to_none=True)
        model(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model, optimizer


def kept(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Weights or a moment of every parameter in a checkpoint."""
    reader, found = checkpoint.Reader(folder), {}
    for name, shape in reader.manifest["shapes"].items():
        if kind != "weights" and name.startswith("frozen"):
            continue
        whole = torch.empty(torch.Size(shape).numel())
        reader.read(kind, checkpoint.Stretch(name, 0, 0, whole.numel()), whole)
        found[name] = whole.view(shape)
    return found


@pytest.fixture(scope="module", params=["adamw", "lamb"])
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    launch("rank_zero.py", 2, folder, ",".join([*FLOAT32, *BF16]), request.param, "whole")
    return request.param, folder


@pytest.mark.parametrize("stage", FLOAT32)
def test_every_stage_steps_as_plain_torch_does(runs, stage):
    name, folder = runs
    assert_plain(folder, name, stage)


@pytest.mark.parametrize("ranks", [1, 4])
def test_lamb_sees_whole_parameters_on_any_number_of_ranks(ranks, tmp_path):
    """Two are above."""
    launch("rank_zero.py", ranks, tmp_path, "1,2,3", "lamb", "whole")
    for stage in "123":
        assert_plain(tmp_path, "lamb", stage)


def let_through(stage: str) -> list[str]:
    """KEY=VALUE of every key of `zero_optimization` that has a single value, at another than its default, unless the
    stage refuses it."""
    found = []
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name == "stage" or not isinstance(default, bool | int | None) or "Config" in str(field.annotation):
            continue
        said = {field.alias or name: 2 if isinstance(default, int) and not isinstance(default, bool) else not default}
        with contextlib.suppress(ValueError):  # DeepSpeed's own refusals
            zero = DeepSpeedZeroConfig(**{"stage": int(stage[0]), "overlap_comm": False} | said)
            if any(refusals(zero, {}, tiny_config()).values()):
                continue
            found += [f"{key}={json.dumps(value)}" for key, value in said.items()]
    return found


@pytest.mark.long
@pytest.mark.parametrize("stage", ["1", "2", "2-once", "3", "3-once"])
def test_every_key_that_is_let_through_steps_as_plain_torch_does(stage, tmp_path):
    """One by one, at a value that is not its default; what does not is in `refusals`."""
    stages = [f"{stage}+{said}" for said in let_through(stage)]
    assert len(stages) > 20
    launch("rank_zero.py", 2, tmp_path, ",".join(stages), "adamw", "whole")
    for one in stages:
        assert_plain(tmp_path, "adamw", one)


def assert_plain(folder, name, stage):
    """The last checkpoint of a run, weights and moments, is what one process comes to without DeepSpeed."""
    model, optimizer = plain(name)
    last = checkpoint.step_folder(folder / f"{name}-{stage}", STEPS)
    weights, start = kept(last, "weights"), Toy()
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(weights[parameter], p.detach(), atol=1e-6, rtol=1e-5)
        for moment in ("exp_avg", "exp_avg_sq") if p in optimizer.state else ():
            torch.testing.assert_close(kept(last, moment)[parameter], optimizer.state[p][moment], atol=1e-7, rtol=1e-5)
    assert not torch.equal(weights["rarely.weight"], start.rarely.weight), "it was stepped where it was used"
    assert torch.equal(weights["frozen.weight"], start.frozen.weight)


def test_a_parameter_counts_the_steps_that_used_it(runs):
    name, folder = runs
    for stage in FLOAT32:
        reader = checkpoint.Reader(checkpoint.step_folder(folder / f"{name}-{stage}", STEPS))
        steps = {n: {p.steps for p in pieces} for n, pieces in reader.pieces.items() if not n.startswith("frozen")}
        assert steps.pop("rarely.weight") == steps.pop("rarely.bias") == {3}
        assert set.union(*steps.values()) == {STEPS}


@pytest.mark.parametrize("stage", [*FLOAT32, *BF16])
def test_consolidated_weights_are_the_gathered_ones(runs, stage):
    """Bit for bit: what the checkpoint puts together without a device is what the model computed with."""
    name, folder = runs
    here = folder / f"{name}-{stage}"
    gathered = torch.load(here / "gathered.pt", weights_only=True)
    state = checkpoint.consolidated(checkpoint.step_folder(here, STEPS))
    assert all(torch.equal(state[n].to(p.dtype), p) for n, p in gathered.items())
    assert torch.equal(state["seen"], torch.arange(3.0))
    assert torch.equal(state["same.weight"], state["second.weight"])
    fresh = Toy()
    fresh.load_state_dict(state)
    norm = json.loads((checkpoint.step_folder(here, STEPS) / "manifest.json").read_text())["norm"]
    assert norm > CLIP, "the gradients are large enough to be clipped"


RESUMED = [
    ("adamw", 1, "1,2,3"),
    pytest.param("adamw", 2, ",".join([*FLOAT32, *BF16]), marks=pytest.mark.long),
    ("lamb", 4, "1,2,3"),
]


@pytest.mark.parametrize(("optimiser", "ranks", "stages"), RESUMED)
def test_another_number_of_ranks_goes_on_alike(runs, optimiser, ranks, stages):
    """2 -> 1 and 2 -> 4 within 1e-6, moments included; 2 -> 2 to the last bit. Frozen weights and two rates too."""
    name, folder = runs
    if name != optimiser:
        pytest.skip(f"{optimiser} is resumed by {ranks}")
    launch("rank_zero.py", ranks, folder, stages, name, f"resume{ranks}")
    for stage in stages.split(","):
        whole = checkpoint.step_folder(folder / f"{name}-{stage}", STEPS)
        resumed = checkpoint.step_folder(folder / f"resume{ranks}-{name}-{stage}", STEPS)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            expected, found = kept(whole, kind), kept(resumed, kind)
            for parameter in expected:
                if ranks == 2:
                    assert torch.equal(found[parameter], expected[parameter]), (stage, kind, parameter)
                torch.testing.assert_close(found[parameter], expected[parameter], atol=1e-6, rtol=1e-6)


def test_a_checkpoint_moves_between_stages(runs, tmp_path):
    name, folder = runs
    if name == "lamb":
        pytest.skip("the format does not know the optimiser")
    (tmp_path / f"{name}-2").mkdir()
    (tmp_path / f"{name}-2" / "checkpoints").symlink_to(folder / f"{name}-3" / "checkpoints")
    launch("rank_zero.py", 1, tmp_path, "2", name, "resume1")
    expected = kept(checkpoint.step_folder(folder / f"{name}-3", STEPS), "weights")
    found = kept(checkpoint.step_folder(tmp_path / f"resume1-{name}-2", STEPS), "weights")
    for parameter in expected:
        torch.testing.assert_close(found[parameter], expected[parameter], atol=1e-6, rtol=1e-6)


def test_half_a_checkpoint_is_named(runs):
    name, folder = runs
    last = checkpoint.step_folder(folder / f"{name}-3", HALF)
    reader = checkpoint.Reader(last)
    reader.pieces["first.weight"].pop()
    with pytest.raises(UserError, match=r"values of first\.weight"):
        reader.read("weights", checkpoint.Stretch("first.weight", 0, 0, 35), torch.empty(35))
