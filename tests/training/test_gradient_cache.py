"""The gradient-cached step against one plain full-batch step: in one process, and on two ZeRO-3 ranks."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.launch import free_port
from tests.conftest import ROOT
from tests.training.conftest import tiny_config
from tests.training.plain import differences, plain_gradients
from training.data import Loader, Shards
from training.distributed import World
from training.families import build
from training.gradient_cache import Outputs, gradient_cached_step
from training.objectives.infonce import InfoNCE


def chunks_of(shards, family, config, chunk, hole=None, retain=0):
    loader = Loader(
        Shards(shards),
        dataclasses.replace(config.loader, chunk=chunk, retain=retain),
        family.image,
        family.encode_text,
        seed=0,
        rank=0,
        world_size=1,
    )
    (chunks,) = list(loader.batches(0, 1))
    if hole is not None:
        joined = torch.cat([c["valid"] for c in chunks])
        joined[hole] = False
        for c, valid in zip(chunks, joined.split([len(c["valid"]) for c in chunks])):
            c["valid"] = valid
    return chunks


def cached_gradients(model, chunks, retain=False):
    model.zero_grad()
    counts = {"generate": sum(model.counts(c)["generate"] for c in chunks)}
    metrics = gradient_cached_step(
        forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
        backward=lambda loss: loss.backward(),
        chunks=chunks,
        counts=counts,
        weights={"generate": 1.0},
        coupled=InfoNCE(reduction="sum"),
        world=World(),
        retain=retain,
    )
    return metrics["loss"], {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 8, 32])
@pytest.mark.parametrize("hole", [None, 5])
@pytest.mark.parametrize("retain", [0, 5, 32])
def test_float64_equals_the_full_batch(shards, tmp_path, chunk, hole, retain):
    config = tiny_config()
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    model = family.model.double()
    chunks = [
        {k: v.double() if v.is_floating_point() else v for k, v in c.items()}
        for c in chunks_of(shards, family, config, chunk, hole, retain)
    ]
    # Embeddings are normalised in float32 by the models; float64 needs the same graph without that cast.
    with patched_float():
        loss, expected = plain_gradients(model, chunks)
        cached_loss, found = cached_gradients(model, chunks, retain > 0)
    whole, worst = differences(found, expected)
    assert whole < 1e-13 and worst < 1e-12, (whole, worst)
    assert abs(float(cached_loss - loss)) < 1e-12


class patched_float:
    """`.float()` keeps float64: exactness is measured without the deliberate casts to float32."""

    def __enter__(self):
        self.original = torch.Tensor.float
        torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else self.original(x)

    def __exit__(self, *_):
        torch.Tensor.float = self.original


def test_dropout_falls_the_same_way_in_both_passes(shards, tmp_path):
    """With dropout on, the step is the gradient of the very masks that its first pass drew."""
    config = tiny_config()
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    model = family.model
    model.h1 = torch.nn.Sequential(model.h1, torch.nn.Dropout(0.3))
    model.h1.weight = model.h1[0].weight
    model.train()
    chunks = chunks_of(shards, family, config, 8)
    seen = []

    def forward(chunk, separable):
        out = Outputs(**model(chunk, separable=separable))
        seen.append(torch.cat([out.left, out.right]).detach().clone())
        return out

    torch.manual_seed(3)
    gradient_cached_step(
        forward=forward,
        backward=lambda loss: loss.backward(),
        chunks=chunks,
        counts={"generate": 1.0},
        weights={"generate": 1.0},
        coupled=InfoNCE(),
        world=World(),
    )
    first, second = seen[: len(chunks)], seen[len(chunks) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], seen[1])


def launched(shards, run, stage, *overrides, family="mmgem"):
    """What rank 0 of two saved, and what they printed."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
    command += [str(free_port()), str(ROOT / "tests/training/rank_gradients.py"), str(shards), str(run), stage, family]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert (run / "gradients.pt").exists(), done.stdout[-3000:] + done.stderr[-5000:]
    return torch.load(run / "gradients.pt", weights_only=True), done.stdout


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
    """Float32, real launcher: the whole vector, each parameter and the temperature within 1e-6."""
    run = tmp_path / "run"
    saved, said = launched(shards, run, stage, *overrides)
    if overrides == AUTO:
        assert 8 < saved["retain"] < 16 and f"{saved['retain']} of 16 samples" in said

    config = tiny_config()
    family = build(config, run / "tokenizer", Shards(shards).every_caption)
    chunks = chunks_of(shards, family, config, 32)
    loss, expected = plain_gradients(family.model, chunks)
    whole, worst = differences(saved["gradients"], expected)
    temperature = float(abs(saved["gradients"]["log_scale"] - expected["log_scale"]) / abs(expected["log_scale"]))
    double = build(config, run / "tokenizer", Shards(shards).every_caption).model.double()
    with patched_float():
        exact_chunks = [{k: v.double() if v.is_floating_point() else v for k, v in c.items()} for c in chunks]
        _, exact = plain_gradients(double, exact_chunks)
    ours, plains = differences(saved["gradients"], exact)[0], differences(expected, exact)[0]
    figures = {"whole": whole, "worst_parameter": worst, "temperature": temperature, "ours_to_float64": ours}
    print(json.dumps({"stage": stage, "overrides": overrides, **figures, "plain_to_float64": plains}))
    assert whole < 1e-6 and worst < 1e-6 and temperature < 1e-6, (whole, worst, temperature)
    assert abs(float(saved["loss"] - loss)) < 1e-5
    assert ours < 2 * plains + 1e-8, (ours, plains)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_512_chunks_under_bf16_are_summed_in_fp32(shards, tmp_path, stage):
    """Within 2e-3 of the same bf16 chunks' gradients summed in float64; summed in bf16 they would be off by 1e-2."""
    run, batch = tmp_path / "run", ("--loader.batch", "1024", "--loader.chunk", "1", "--loader.max_error_rate", "1")
    saved, _ = launched(shards, run, stage, "--precision", "bf16", *batch)
    config = tiny_config(*batch)
    family = build(config, run / "tokenizer", Shards(shards).every_caption)
    model = family.model.bfloat16()
    chunks = chunks_of(shards, family, config, 1)
    chunks = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in c.items()} for c in chunks]
    exact = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    rough = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def backward(loss):
        loss.backward()
        for n, p in model.named_parameters():
            exact[n] += p.grad.double()
            rough[n] += p.grad
            p.grad = None

    gradient_cached_step(
        forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
        backward=backward,
        chunks=chunks,
        counts={"generate": sum(model.counts(c)["generate"] for c in chunks)},
        weights={},
        coupled=InfoNCE(reduction="sum"),
        world=World(),
    )
    for gradients in (exact, rough, saved["gradients"]):
        del gradients["log_scale"]
    error, in_bf16 = differences(saved["gradients"], exact)[0], differences(rough, exact)[0]
    print(json.dumps({"stage": stage, "error": error, "summed_in_bf16": in_bf16}))
    assert error < 2e-3 < in_bf16
