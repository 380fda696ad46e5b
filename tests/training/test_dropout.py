"""An adapter's dropout: the cached step is the gradient of the very masks that its first pass drew, in every family."""

import pytest
import torch

from curation.errors import UserError
from tests.training.conftest import coca_config, flava_config, tiny_config, vlm2vec_config
from tests.training.plain import differences, doubled, patched_float, plain_gradients
from tests.training.step import cached_gradients, chunks_of
from tests.training.test_adapters import moved
from tests.training.vlm import ADAPTER
from training.data import Shards
from training.families import build
from training.gradient_cache import Outputs
from training.models.dropout import Dropout, stacked

RUNS = {
    "lora": lambda: tiny_config("--adapter", "{kind: lora, module: llm, r: 4, dropout: 0.3}"),
    "vera": lambda: tiny_config("--adapter", "{kind: vera, module: llm, r: 4, dropout: 0.3}"),
    "dora": lambda: tiny_config("--adapter", "{kind: dora, module: llm, r: 4, dropout: 0.3}"),
    "negatives": lambda: tiny_config("--adapter", "{module: llm, r: 4, dropout: 0.3}", "--mmgem.negatives", "1"),
    "vision": lambda: tiny_config("--adapter", "{module: vision, r: 4, dropout: 0.3, target_modules: '.*c_(fc|proj)'}"),
    "flava": lambda: flava_config(
        *("--loader.batch", "32", "--loader.chunk", "8"),
        *("--adapter", "{module: '', r: 4, dropout: 0.3, target_modules: '.*(query|value|image_projection)'}"),
    ),
    "coca": lambda: coca_config("--adapter", "{module: towers, r: 4, dropout: 0.3, target_modules: '.*c_(fc|proj)'}"),
    "vlm2vec": lambda: vlm2vec_config(*ADAPTER, "--adapter.dropout", "0.3"),
}


@pytest.mark.parametrize("retain", [0, 8])
@pytest.mark.parametrize("name", RUNS)
def test_the_cached_step_is_the_gradient_of_the_masks_drawn(name, retain, shards, tmp_path):
    """One backward pass through all chunks' graphs, each from the random state it was first met in, in float64."""
    config = RUNS[name]()
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    moved(family.model)  # an adapter begins where masks change nothing
    model = family.model.double().train()
    chunks = [doubled(chunk) for chunk in chunks_of(shards, family, config, retain=retain)]
    states = []

    def forward(chunk, separable):
        if len(states) < len(chunks):
            states.append(torch.get_rng_state())
        return Outputs(**model(chunk, separable=separable))

    with patched_float():
        torch.manual_seed(3)
        metrics, found = cached_gradients(model, chunks, config.objective, retain > 0, forward)
        loss, expected = plain_gradients(
            model, chunks, config.objective, before=lambda number: torch.set_rng_state(states[number])
        )
        _, without = plain_gradients(model.eval(), chunks, config.objective)
    error, worst = differences(found, expected)
    assert error < 1e-12 and worst < 1e-11, (error, worst)
    assert abs(float(metrics["loss"] - loss)) < 1e-11
    assert differences(without, expected)[0] > 0.01, "the masks matter"
    assert any(isinstance(module, Dropout) for module in model.modules())


def test_masks_are_corners_of_the_larger_ones():
    layer = Dropout(0.4)
    small, large = torch.ones(3, 5, 7), torch.ones(5, 6, 7)
    torch.manual_seed(0)
    with stacked(3, 2, 1):
        found = [layer(small), layer(small)]
    torch.manual_seed(0)
    expected = [layer(large), layer(large)]
    for a, b in zip(found, expected):
        assert torch.equal(a, b[:3, :5])
    assert not torch.equal(*found) and expected[0].mean() == pytest.approx(1, abs=0.1)
    assert sorted(found[0].unique().tolist()) == [0.0, pytest.approx(1 / 0.6)]
    assert torch.equal(layer.eval()(small), small)


def test_rows_that_are_not_the_chunk_s_are_refused():
    with pytest.raises(UserError, match=r"adapter\.dropout: a layer sees 15 rows of 3") as error, stacked(3, 2):
        Dropout(0.4)(torch.ones(15, 7))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"adapter\.dropout: with module '' its masks could not be drawn alike"):
        tiny_config("--adapter", "{module: '', dropout: 0.1}")
    assert tiny_config("--adapter", "{module: '', dropout: 0}").adapter.dropout == 0
