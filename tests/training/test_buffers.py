"""Under bf16 rotary frequencies and frozen statistics, which are buffers, keep their digits, and the step is right."""

import pytest
import torch
import yaml

from tests.training.beginnings import begun, first_step
from tests.training.rank_buffers import RECIPES, STAGES
from tests.training.ranks import launch
from tests.training.test_batch_norm import RESNET
from training import checkpoint
from training.config import ObjectiveConfig
from training.loop import into_training
from training.models.clip import Clip, export
from training.optim import parameter_groups


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """(a ResNet's export, the runs' folder)."""
    folder = tmp_path_factory.mktemp("buffers")
    torch.manual_seed(0)
    clip = Clip(yaml.safe_load(RESNET), ObjectiveConfig())
    for name, buffer in clip.named_buffers():  # as after training
        if "running" in name:
            buffer.uniform_(0.5, 2)
    export(clip, clip.state_dict(), {"size": [32, 32]}, folder / "resnet")
    launch("rank_buffers.py", 1, shards, folder / "resnet", folder)
    return folder / "resnet", folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RECIPES)
def test_buffers_keep_their_digits_at_every_stage(runs, shards, name, stage):
    """VeRA's matrices alone are rounded, as peft multiplies them with its vectors."""
    resnet, folder = runs
    config, run = RECIPES[name](resnet, "--precision", "fp32"), folder / name / str(stage)
    family, sources = begun(config, shards, run / "tokenizer")
    found = torch.load(folder / "found.pt", weights_only=True)[f"{name} {stage}"]
    built = dict(family.model.named_buffers())
    saved = checkpoint.consolidated(checkpoint.step_folder(run, 1))
    assert found["buffers"].keys() == built.keys()
    sharp = 0
    for n, buffer in built.items():
        expected = buffer.bfloat16() if ".vera_" in n else buffer
        assert found["buffers"][n].dtype == expected.dtype, n
        assert torch.equal(found["buffers"][n], expected), n
        assert n not in saved or torch.equal(saved[n], expected.to(saved[n].dtype)), n
        sharp += not torch.equal(buffer, buffer.bfloat16().to(buffer.dtype))
    assert sharp, "rounding would show"

    parameter_groups(family.model.named_parameters(), config.optim)
    into_training(family.model, config.family)
    loss, _ = first_step(config, family, sources)
    print(name, stage, {"bf16": found["loss"], "fp32": loss})
    assert found["loss"] == pytest.approx(loss, rel=2e-2)
