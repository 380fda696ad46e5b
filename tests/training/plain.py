"""The step written the plain way: one forward over the whole batch, autograd through a textbook loss.

Shared by the tests of gradients; nothing here uses the project's step, loss or chunking.
"""

import torch
from torch.nn import functional as F


def whole_batch(chunks):
    """Join chunks, whose captions may be padded to different lengths."""
    longest = max(c["input_ids"].shape[1] for c in chunks)
    fill = {"input_ids": 0, "labels": -100}
    pad = lambda name, x: F.pad(x, (0, longest - x.shape[1]), value=fill[name]) if name in fill else x  # noqa: E731
    return {name: torch.cat([pad(name, c[name]) for c in chunks]) for name in chunks[0]}


def plain_gradients(model, chunks, generate_weight=1.0):
    """{parameter: gradient} of InfoNCE (sum of both directions) + weight * token-mean captioning loss."""
    model.zero_grad()
    batch = whole_batch(chunks)
    out = model(batch, separable=True)
    valid = batch["valid"]
    s = out["scalars"]["log_scale"].exp() * out["left"][valid] @ out["right"][valid].T
    target = torch.arange(len(s))
    loss = F.cross_entropy(s, target) + F.cross_entropy(s.T, target)
    tokens = (batch["labels"][valid] >= 0).sum()
    loss = loss + generate_weight * out["sums"]["generate"] / tokens
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def differences(found, expected):
    """(whole-vector relative error, worst parameter's error against max(its norm, whole norm / sqrt(count)))."""
    names = sorted(expected)
    whole = torch.cat([expected[n].flatten().double() for n in names])
    error = torch.cat([(found[n].double() - expected[n].double()).flatten() for n in names])
    floor = whole.norm() / len(names) ** 0.5
    worst = max(
        float((found[n].double() - expected[n].double()).norm() / max(expected[n].double().norm(), floor))
        for n in names
    )
    return float(error.norm() / whole.norm()), worst
