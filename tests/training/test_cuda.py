"""The step on a GPU that is not there: no tensor meets one of another device, and few numbers are waited for.

Backward passes need a real one: torch's engine asks for its context.
"""

from types import SimpleNamespace

import pytest
import torch

from curation.errors import UserError
from tests.training.conftest import clip_config, coca_config, flava_config, siglip_config, tiny_config, vlm2vec_config
from tests.training.fake_gpu import CUDA, Stops, fake_mode, on_gpu
from tests.training.step import chunks_of, rounded
from training import zero
from training.data import Shards
from training.distributed import World
from training.families import build
from training.health import Health
from training.loop import Trainer
from training.optim import Sharded, parameter_groups
from training.train import full_gpu_named

CASES = {  # the recipe, and how often a chunk of it waits: for the words and patches that its labels ask for
    "mmgem": (lambda: tiny_config("--optim.name", "lamb", "--objective.duplicates", "positive"), 2),
    "mmgem in bf16": (lambda: tiny_config("--precision", "bf16", "--adapter", "{module: llm, dropout: 0.1}"), 2),
    "flava": (flava_config, 4),
    "coca": (coca_config, 2),
    "clip": (lambda: clip_config("--clip.patch_dropout", "0.5"), 0),
    "siglip": (siglip_config, 0),
    "vlm2vec": (vlm2vec_config, 0),
}
PICTURES = ("pixel_values", "image_grid_thw")
"""Of a VLM, whose tower makes as many tokens as the values say: no fake tensor knows how many."""


class Engine:
    """DeepSpeed's at stage 0, without its backward pass: gradients have no values."""

    device = CUDA

    def __init__(self, model, optimizer):
        self.module, self.optimizer = model, optimizer

    def __call__(self, chunk, separable):
        assert all(x.is_cuda for x in chunk.values())
        return self.module(chunk, separable=separable)

    def zero_optimization_stage(self):
        return 0

    def backward(self, loss, scale_wrt_gas):
        assert loss.is_cuda and loss.ndim == 0
        for p in self.module.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_a_step_keeps_to_its_gpu_and_runs_ahead(name, shards, tmp_path):
    config, waits = CASES[name][0](), CASES[name][1]
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    chunks = [
        {key: x for key, x in chunk.items() if not key.endswith(PICTURES) or name != "vlm2vec"}
        for chunk in chunks_of(shards, family, config, chunk=4)
    ]
    model, found = rounded(family.model, getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[config.precision])), {}
    with fake_mode() as mode:
        on_gpu(model).train()
        optimizer = Sharded(parameter_groups(model.named_parameters(), config.optim), config.optim)
        engine = Engine(model, optimizer)
        optimizer.attach(zero.shards(engine), World())
        optimizer.clip = 1.0
        used = SimpleNamespace(names=[n for n, _ in model.named_parameters()], agree=lambda world: None)  # all of them
        health = Health(max_ratio=None, max_skipped=9)
        trainer = Trainer(engine, optimizer, used, family, SimpleNamespace(retain=1), config, World(), health)
        for n, sunk in ((2, True), (3, False)):  # sums that sank are taken again in fp64
            with Stops(sunk) as stops:
                trainer.step(0, [{key: mode.from_tensor(x) for key, x in chunk.items()} for chunk in chunks[:n]])
            found[n] = stops.counted
    assert found[2].total() > 0 and found[3] - found[2] == ({"mask": waits} if waits else {}), found


def test_a_gpu_that_is_full_is_a_users_error_in_one_line():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB free."
    wanted = r"^loader\.chunk: .* does not hold 8 samples .*2\.00 GiB\. GPU 0.*\); lower it"
    with pytest.raises(UserError, match=wanted) as found, full_gpu_named(tiny_config()):
        raise torch.OutOfMemoryError(said)
    assert "\n" not in str(found.value)
