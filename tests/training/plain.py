"""The step written the plain way: the whole batch forward, autograd through textbook losses. And the measure by which
every family's gradients are held against it.

Nothing here uses the project's step or losses.
"""

import json

import torch
from torch.nn import functional as F

FILL = {"input_ids": 0, "labels": -100, "masked_ids": 0, "attention_mask": 0, "text_labels": -100}
LABELS = {"itm": "itm_labels", "mim": "image_labels", "mmm_image": "image_labels", "mlm": "text_labels"}
LABELS |= {"mmm_text": "text_labels", "generate": "labels"}


class patched_float:
    """`.float()` keeps float64: exactness is measured without the deliberate casts to float32."""

    def __enter__(self):
        self.original = torch.Tensor.float
        torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else self.original(x)

    def __exit__(self, *_):
        torch.Tensor.float = self.original


def doubled(chunk):
    return {name: x.double() if x.is_floating_point() else x for name, x in chunk.items()}


def whole_batch(chunks):
    """Join chunks, whose captions may be padded to different lengths."""
    longest = max(c["input_ids"].shape[1] for c in chunks)
    pad = lambda name, x: F.pad(x, (0, longest - x.shape[1]), value=FILL[name]) if name in FILL else x  # noqa: E731
    return {name: torch.cat([pad(name, c[name]) for c in chunks]) for name in chunks[0]}


def contrastive(outs, chunks, objective):
    """InfoNCE or SigLIP over the rows that count; their hard negatives are further columns."""
    left = torch.cat([out["left"] for out in outs])
    right = torch.cat([out["right"] for out in outs])
    right = right.reshape(len(left), -1, left.shape[1])  # [b, m, D]
    rows = torch.cat([c.get("coupled", c["valid"]) for c in chunks])
    hard = right[:, 1:]
    if right.shape[1] > 1:
        hard = hard[rows][torch.cat([c["right_valid"] for c in chunks])[rows, 1:]]
    columns = torch.cat([right[rows, 0], hard.reshape(-1, left.shape[1])])
    scalars = outs[0]["scalars"]
    s, n = scalars["log_scale"].exp() * left[rows] @ columns.T, int(rows.sum())
    if not n:
        return s.sum()
    if objective.coupled == "siglip":
        sign = 2 * torch.eye(n, len(columns), dtype=s.dtype) - 1
        return -F.logsigmoid(sign * (s + scalars["logit_bias"])).sum() / n
    target = torch.arange(n)
    loss = F.cross_entropy(s, target) + F.cross_entropy(s[:, :n].T, target)
    return loss / 2 if objective.reduction == "mean" else loss


def units(name, chunk):
    """Labels of valid rows: how many terms a separable sum of the chunk has."""
    if LABELS[name] in chunk:
        labels = chunk[LABELS[name]][chunk["valid"]]
        if LABELS[name] == "image_labels" and "patches" in chunk:
            labels = torch.stack([row[kept] for row, kept in zip(labels, chunk["patches"][chunk["valid"]])])
        return int((labels >= 0).sum())
    return int((chunk["input_ids"][chunk["valid"]][:, 1:] != 0).sum())  # CoCa's next tokens


def plain_gradients(model, chunks, objective, before=lambda number: None):
    """(loss, {parameter: gradient}) of the recipe's objective, by one backward pass through all chunks' graphs.

    before: is called with a chunk's number when its turn comes.
    """
    model.zero_grad()
    outs = []
    for number, chunk in enumerate(chunks):
        before(number)
        outs.append(model(chunk, separable=True))
    loss = contrastive(outs, chunks, objective) * objective.weights.get("embed", 1.0)
    for name in outs[0].get("sums", {}):
        total, count = sum(out["sums"][name] for out in outs), sum(units(name, chunk) for chunk in chunks)
        loss = loss + objective.weights.get(name, 1.0) * total / max(count, 1)
    loss.backward()
    return loss.detach(), gradients_of(model)


def gradients_of(model):
    """{parameter that trains: gradient}, zero where nothing reached it."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}


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


def assert_a_plain_step(saved, model, chunks, objective):
    """The one measure of every family: what ranks `saved` of a float32 step is within 1e-6 of one plain process's
    gradient, and no farther from float64 than twice that plain gradient is; as a whole, by parameter, and each of the
    loss's scalars. Returns the float64 gradients, and leaves the model in float64."""
    batch = [whole_batch(chunks)] if len(chunks) > 1 and "input_ids" in chunks[0] else chunks
    found = saved["gradients"]
    loss, expected = plain_gradients(model, batch, objective)
    with patched_float():
        _, exact = plain_gradients(model.double(), [doubled(chunk) for chunk in batch], objective)
    assert found.keys() == expected.keys()
    apart, ours, plains = (differences(*pair) for pair in ((found, expected), (found, exact), (expected, exact)))
    far = lambda a, n: float((a[n].double() - exact[n]).norm() / exact[n].norm())  # noqa: E731
    scalars = {n: (far(found, n), far(expected, n)) for n in model.scalars if n in expected}
    print(json.dumps({"apart": apart, "ours_to_float64": ours, "plain_to_float64": plains, **scalars}))
    assert apart[0] < 1e-6 and apart[1] < max(1e-6, 2 * plains[1]), (apart, plains)  # (whole vector, worst parameter)
    assert all(mine < 2 * theirs + 1e-8 for mine, theirs in zip(ours, plains)), (ours, plains)
    assert all(mine < max(1e-6, 2 * theirs) for mine, theirs in scalars.values()), scalars
    assert abs(float(saved["loss"] - loss)) < 1e-5
    return exact
