"""The coupled losses written as their papers do, pair by pair over the whole batch, with autograd for the gradient."""

import torch
from torch.nn import functional as F

from training.objectives.coupled import Rows

SCALARS = ("log_scale", "logit_bias")


def batch(*, b, m=1, width=6, holes=0, groups=0, scale=14.0, seed=0, dtype=torch.float64):
    """(left [b, D], right [b, m, D], scalars, rows): `holes` rows and about a quarter of the hard negatives lack."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    left, right = F.normalize(random(b, width), dim=-1), F.normalize(random(b, m, width), dim=-1)
    valid, right_valid = torch.ones(b, dtype=torch.bool), torch.ones(b, m, dtype=torch.bool)
    valid[torch.randperm(b, generator=generator)[: min(holes, b - 1)]] = False
    right_valid[:, 1:] = torch.rand(b, m - 1, generator=generator) < 0.75
    number = torch.randint(groups, (b,), generator=generator) if groups else None
    scalars = {"log_scale": torch.tensor([scale]).log(), "logit_bias": torch.tensor([-2.5])}
    scalars = {name: x.to(dtype) for name, x in scalars.items()}
    return left.to(dtype), right.to(dtype), scalars, Rows(valid, right_valid, number)


def candidates(left, right, scalars, rows):
    """(logits [n, n + hard negatives], groups as a list) of the n rows that count; column i is row i's positive."""
    there = (rows.valid & rows.right_valid[:, 0]).nonzero()[:, 0]
    hard = right[there][:, 1:][rows.right_valid[there][:, 1:]]
    s = scalars["log_scale"].exp() * left[there] @ torch.cat([right[there][:, 0], hard]).T
    groups = there if rows.groups is None else rows.groups[there]
    return s, groups.tolist()


def infonce(s, groups, scalars, *, duplicates="negative", directions="both", reduction="mean"):
    n, loss = len(s), 0.0
    for i in range(n):
        same = [j for j in range(n) if groups[j] == groups[i]]
        positives = same if duplicates == "positive" else [i]
        counted = [j for j in range(n) if j == i or duplicates != "masked" or j not in same]
        every = counted + list(range(n, s.shape[1]))
        forth = s[i, every].logsumexp(0) - s[i, positives].mean()
        back = s[counted, i].logsumexp(0) - s[positives, i].mean()
        loss = loss + {"both": forth + back, "left_to_right": forth}[directions] / n
    return loss / 2 if directions == "both" and reduction == "mean" else loss


def siglip(s, groups, scalars, *, duplicates="negative"):
    n, loss = len(s), 0.0
    s = s + scalars["logit_bias"]
    for i in range(n):
        for j in range(s.shape[1]):
            again = j < n and j != i and groups[i] == groups[j]
            if again and duplicates == "masked":
                continue
            z = 1.0 if j == i or (again and duplicates == "positive") else -1.0
            loss = loss - F.logsigmoid(z * s[i, j]) / n
    return loss


def gradients(loss, left, right, scalars, rows, **settings):
    """{"value", "left", "right", each scalar}, in float64 whatever the inputs are."""
    leaves = {"left": left, "right": right, **scalars}
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    those = {name: leaves[name] for name in SCALARS}
    s, groups = candidates(leaves["left"], leaves["right"], those, rows)
    value = loss(s, groups, those, **settings)
    value.backward()
    return {"value": value.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def as_dict(found):
    return {"value": found.value, "left": found.left, "right": found.right, **found.scalars}


def assert_close(found, expected, tolerance):
    """Each by the norm of its difference, relative where the norm is not small.

    A single number is a sum of numbers of either sign about 1; the gradient of a row without negatives is exactly 0.
    """
    assert set(found) == set(expected)
    for name, x in expected.items():
        error = float((found[name].double().reshape(x.shape) - x).norm())
        assert error <= tolerance * max(float(x.norm()), 1.0 if x.numel() == 1 else 0.1), (name, error, float(x.norm()))
