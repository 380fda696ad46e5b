"""What a rank holds of its batch on the device of its engine."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from tests.training.conftest import tiny_config
from training import loop
from training.distributed import World
from training.loop import Trainer


class Engine:
    """Embeds "x", and looks at each forward which chunks are on its device."""

    device = "the device asked for"

    def __init__(self):
        self.weight, self.log_scale = torch.nn.Parameter(torch.eye(6)), torch.nn.Parameter(torch.zeros(1))
        self.there, self.seen = [], []

    def zero_optimization_stage(self):
        return 0

    def moved(self, device, chunk):
        assert device == self.device
        copies = {name: tensor.clone() for name, tensor in chunk.items()}
        self.there.append(weakref.ref(copies["x"]))
        return copies

    def __call__(self, chunk, separable):
        alive = [x for ref in self.there if (x := ref()) is not None]
        assert any(x is chunk["x"] for x in alive), "it was brought here"
        self.seen.append(len(alive))
        out = torch.nn.functional.normalize(chunk["x"] @ self.weight, dim=-1)
        return {"left": out, "right": out.roll(1, -1), "scalars": {"log_scale": self.log_scale}}

    def backward(self, loss, scale_wrt_gas):
        loss.backward()


@pytest.mark.parametrize("retained", [0, 4])
def test_one_chunk_at_a_time_is_on_the_device(monkeypatch, retained):
    """And what is retained, until its backward pass."""
    engine, config = Engine(), tiny_config()
    monkeypatch.setattr(loop, "_on", engine.moved)
    family = SimpleNamespace(model=SimpleNamespace(separable=(), counts=lambda chunk: {}))
    source = SimpleNamespace(retain=retained)
    trainer = Trainer(engine, None, None, family, source, config, World(), None)
    generator = torch.Generator().manual_seed(0)
    chunks = [{"x": torch.randn(4, 6, generator=generator), "valid": torch.ones(4, dtype=torch.bool)} for _ in range(5)]
    trainer.accumulate(chunks)
    kept = int(retained > 0)
    assert engine.seen == [1, *[1 + kept] * 4, *[1] * (5 - kept)]
    assert engine.weight.grad.abs().sum() > 0
