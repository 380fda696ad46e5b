"""A recipe's first batch, and the project's step over it in one process, for any family."""

import dataclasses

import torch

from tests.training.plain import gradients_of
from training.data import Loader, Shards, Source
from training.distributed import World
from training.gradient_cache import Outputs, gradient_cached_step
from training.objectives import build as build_objective


def chunks_of(shards, family, config, chunk=None, hole=None, retain=0):
    """The first global batch in chunks of `chunk` rows (the recipe's), of one rank; row `hole` counts for nothing."""
    sources = [Source(name="data", samples=Shards(shards))]
    if family.prepare is not None:
        family.prepare(sources)
    loader = Loader(
        sources,
        dataclasses.replace(config.loader, chunk=chunk or config.loader.chunk, retain=retain),
        family.image,
        family.encode_text,
        seed=config.seed,
        rank=0,
        world_size=1,
        extra=family.extra,
        mismatched=family.mismatched,
    )
    (chunks,) = list(loader.batches(0, 1))
    if hole is not None:
        joined = torch.cat([c["valid"] for c in chunks])
        joined[hole] = False
        for c, valid in zip(chunks, joined.split([len(c["valid"]) for c in chunks])):
            c["valid"] = valid
    return chunks


def rounded(model, dtype):
    """The model as an engine takes it: its parameters in this type, its buffers in their own."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    return model


def cached_gradients(model, chunks, objective, retain=False, forward=None):
    """(metrics, {parameter: gradient}) of the gradient-cached step.

    forward: stands in for the model's.
    """
    model.zero_grad()
    metrics = gradient_cached_step(
        forward=forward or (lambda chunk, separable: Outputs(**model(chunk, separable=separable))),
        backward=lambda loss: loss.backward(),
        chunks=chunks,
        counts={name: sum(model.counts(c).get(name, 0.0) for c in chunks) for name in model.separable},
        weights=objective.weights,
        coupled=build_objective(objective),
        world=World(),
        retain=retain,
    )
    return metrics, gradients_of(model)
