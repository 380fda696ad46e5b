"""The gradient-cached step against one plain full-batch step: in one process, and on two ZeRO-3 ranks."""

import json

import pytest
import torch

from tests.training.conftest import tiny_config
from tests.training.plain import (
    assert_a_plain_step,
    contrastive,
    differences,
    doubled,
    patched_float,
    plain_gradients,
    whole_batch,
)
from tests.training.ranks import launched
from tests.training.step import cached_gradients, chunks_of, rounded
from training.data import Shards
from training.families import build


@pytest.mark.parametrize("chunk", [1, 3, 8, 32])
@pytest.mark.parametrize("hole", [None, 5])
@pytest.mark.parametrize("retain", [0, 5, 32])
def test_float64_equals_the_full_batch(shards, tmp_path, chunk, hole, retain):
    config = tiny_config()
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    model = family.model.double()
    chunks = [doubled(c) for c in chunks_of(shards, family, config, chunk, hole, retain)]
    # Embeddings are normalised in float32 by the models; float64 needs the same graph without that cast.
    with patched_float():
        loss, expected = plain_gradients(model, [whole_batch(chunks)], config.objective)
        metrics, found = cached_gradients(model, chunks, config.objective, retain > 0)
    whole, worst = differences(found, expected)
    assert whole < 1e-13 and worst < 1e-12, (whole, worst)
    assert abs(float(metrics["loss"] - loss)) < 1e-12


AUTO = ("--loader.retain", "auto", "--loader.retain_gib", "0.0045")


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        pytest.param("0", (), marks=pytest.mark.long),
        ("1", ()),
        ("2", ("--loader.retain", "6")),
        pytest.param("3", (), marks=pytest.mark.long),
        pytest.param("3", ("--loader.retain", "16"), marks=pytest.mark.long),
        ("3", AUTO),
        ("3", ("--activation_checkpointing", "true")),
        pytest.param("3_offload", ("--loader.retain", "6"), marks=pytest.mark.long),
    ],
    ids=["zero0", "zero1", "zero2-retain6", "zero3", "zero3-retain16", "zero3-auto", "zero3-checkpointing", "offload"],
)
def test_two_ranks_equal_one_plain_process(shards, tmp_path, stage, overrides):
    """Float32, real launcher."""
    run = tmp_path / "run"
    saved, said = launched(shards, run, stage, "mmgem", *overrides)
    if overrides == AUTO:
        assert 8 < saved["retain"] < 16 and f"{saved['retain']} of 16 samples" in said

    config = tiny_config()
    family = build(config, run / "mmgem" / "tokenizer", Shards(shards).every_caption)
    assert_a_plain_step(saved, family.model, chunks_of(shards, family, config, 32), config.objective)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_512_chunks_under_bf16_are_summed_in_fp32(shards, tmp_path, stage):
    """What summing costs: within 2e-3 of the same bf16 graphs' gradients summed in float64, where sums in bf16 would be
    off by 1e-2. What bf16 rounds inside a chunk is on both sides. The loss over the embeddings of the bf16 forward, its
    gradients and the temperature's are the textbook's, in float64."""
    run, batch = tmp_path / "run", ("--loader.batch", "1024", "--loader.chunk", "1", "--loader.retain", "0")
    saved, _ = launched(shards, run, stage, "mmgem", "--precision", "bf16", *batch)
    assert saved["chunks"] == 512
    config = tiny_config(*batch)
    family = build(config, run / "mmgem" / "tokenizer", Shards(shards).every_caption)
    model = rounded(family.model, torch.bfloat16)
    log_scale = model.log_scale.detach().double().requires_grad_()  # fp32 masters begin from bf16, as ZeRO has it
    chunks = chunks_of(shards, family, config, 1)
    chunks = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in c.items()} for c in chunks]
    with torch.no_grad():
        outs = [model(chunk) for chunk in chunks]
    sides = {name: torch.cat([out[name] for out in outs]).double().requires_grad_() for name in ("left", "right")}
    whole = {"valid": torch.cat([chunk["valid"] for chunk in chunks])}
    contrastive([{**sides, "scalars": {"log_scale": log_scale}}], [whole], config.objective).backward()
    count = sum(model.counts(chunk)["generate"] for chunk in chunks)
    trained = {n: p for n, p in model.named_parameters() if n != "log_scale"}
    exact = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in trained.items()}
    rough = {n: torch.zeros_like(p) for n, p in trained.items()}
    for number, chunk in enumerate(chunks):
        out = model(chunk, separable=True)
        embedded = sum((out[name] * x.grad[[number]].float()).sum() for name, x in sides.items())
        (embedded + out["sums"]["generate"] / count).backward()
        for n, p in trained.items():
            exact[n] += p.grad.double()
            rough[n] += p.grad
            p.grad = None
    found = saved["gradients"]
    scale = abs(float(found.pop("log_scale") / log_scale.grad) - 1)
    error, in_bf16 = differences(found, exact)[0], differences(rough, exact)[0]
    print(json.dumps({"stage": stage, "error": error, "summed_in_bf16": in_bf16, "log_scale": scale}))
    assert error < 2e-3 < in_bf16
    assert scale < 2**-8, "a bf16 parameter's gradient is rounded once"
