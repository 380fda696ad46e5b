"""Batch norms: refused where they train, and where they are frozen the step is that of the whole batch."""

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from curation.errors import UserError
from tests.training.conftest import clip_config
from tests.training.plain import differences, plain_gradients, whole_batch
from tests.training.step import cached_gradients, chunks_of
from training.data import Shards
from training.families import build
from training.loop import into_training, make_trainer
from training.optim import parameter_groups

RESNET = """{embed_dim: 16, vision_cfg: {image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 16},
 text_cfg: {context_length: 24, vocab_size: 49408, width: 32, heads: 2, layers: 1}}"""


def config_of(*overrides):
    words = ("--clip.model_cfg", RESNET, "--loader.batch", "12", "--loader.chunk", "4", "--precision", "fp32")
    return clip_config(*words, "--deepspeed", "ds_configs/zero0.json", *overrides)


def test_a_batch_norm_that_trains_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match=r"^clip: towers\.visual\.bn1 is a batch norm, .*; take an arch") as error:
        make_trainer(config_of(), Shards(shards), tmp_path)
    assert "\n" not in str(error.value)
    for unkept in (torch.nn.BatchNorm1d(3, affine=False), torch.nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.raises(UserError, match="clip: 0 is a batch norm"):
            into_training(torch.nn.Sequential(unkept), "clip")


def test_a_frozen_one_keeps_its_statistics_and_the_step_is_exact(shards, tmp_path):
    config = config_of("--optim.groups", "[{pattern: '^towers\\.visual\\.', frozen: true}]")
    family = build(config, tmp_path / "tokenizer", list)
    model = family.model
    parameter_groups(model.named_parameters(), config.optim)
    into_training(model, config.family)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for norm in norms:  # as after training, not the identity
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    before = [buffer.clone() for buffer in model.buffers()]
    assert norms and model.training and not any(norm.training for norm in norms)

    chunks = chunks_of(shards, family, config)
    _, expected = plain_gradients(model, [whole_batch(chunks)], config.objective)
    _, found = cached_gradients(model, chunks, config.objective)
    assert len(chunks) == 3 and max(differences(found, expected)) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
