"""The gradient-cached step: a batch as large as the loss wants in the memory of one chunk.

1. Embed every chunk without a graph, remembering the random state each began with.
2. Take the coupled loss over the global batch, and its gradient with respect
   to the embeddings, in closed form.
3. Run every chunk again with a graph, from the same random state, and
   back-propagate <embedding, cached gradient> together with the separable sums
   (captioning, ...) of that chunk. Separable sums need no cache, so they are
   not computed in the first pass.

The first chunk may be retained: it is run once, with its graph and separable
sums. It is as large as memory has room for graphs (one chunk and not several,
since ZeRO-3 allows no second forward before the first one's backward), so the
step costs between 4/3 (nothing retained) and 1 (all) of a plain full-batch step.

The sum of these chunk gradients is the gradient of the full-batch loss: the
coupled part by the chain rule, the separable part because sums are divided by
counts over the whole global batch, agreed before the second pass. Gao et al.,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(2021), extended by separable losses and by ZeRO.

ZeRO averages gradients over the ranks, where the loss is already global: local
parts are multiplied by the world size. The temperature's gradient is global on
every rank, so averaging leaves it as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from training.distributed import World
from training.objectives.coupled import Coupled, CoupledGradient, Rows

Chunk = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Outputs:
    """What a model says of one chunk; without `left` the chunk has no coupled part (texts alone, say).

    left [c, D], right [c, D] or [c, m, D]: unit embeddings of the pair's sides, fp32; right[:, 1:] are hard negatives ·
    scalars {name: [1]}: what the coupled loss learns beside them, such as "log_scale" ·
    sums {name: []}: separable losses summed over their units (tokens, samples).
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


class Replay:
    """The random state at the beginning of a chunk, so that dropout falls the same way twice."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)


def rows_of(chunks: Sequence[Chunk], m: int, device: torch.device | str = "cpu") -> Rows:
    """What counts in the coupled loss, of chunks whose model embeds them: "coupled" [c] where it is less than "valid"
    (pairs that do not belong together), "right_valid" [c, m] and "groups" [c] where the chunks have them. All of it is
    brought to the embeddings' device, which the chunks need not be on."""
    valid = torch.cat([c.get("coupled", c["valid"]) for c in chunks])
    given = "right_valid" in chunks[0]
    right_valid = torch.cat([c["right_valid"] for c in chunks]) if given else valid[:, None].expand(-1, m)
    groups = torch.cat([c["groups"] for c in chunks]) if "groups" in chunks[0] else None
    return Rows(valid.to(device), right_valid.to(device), None if groups is None else groups.to(device))


def gradient_cached_step(
    *,
    forward: Callable[[Chunk, bool], Outputs],
    backward: Callable[[torch.Tensor], None],
    chunks: Sequence[Chunk],
    counts: Mapping[str, float],
    weights: Mapping[str, float],
    coupled: Coupled,
    world: World,
    retain: bool = False,
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of `coupled + sum of weights * separable means` over the global batch.

    Args:
        forward: (chunk, separable) -> Outputs; `separable` asks for the sums. Brings the chunk to the model's device.
        backward: back-propagates a scalar, e.g. `engine.backward`.
        chunks: this rank's part of the batch; every rank has chunks of the same kinds and sizes, in the same order.
            `chunk["valid"]` is bool [c]: rows that count.
        counts: units of each separable sum on this rank (tokens to be predicted, ...).
        weights: of the separable losses, and of the coupled one as "embed" (1 where not named).
        retain: keep the first chunk's graph from the first pass.

    Returns:
        The global "loss", "loss_embed" and "temperature" (where a chunk has a coupled part), "loss_<separable>" (where
        the batch has units of it), "gradient_<scalar>", each [].
    """
    states: list[Replay] = []
    embedded: list[Outputs] = []
    for number, chunk in enumerate(chunks):
        states.append(Replay())
        kept = retain and number == 0
        with torch.set_grad_enabled(kept):
            embedded.append(forward(chunk, kept))
    after = Replay()
    ends, end = [], 0  # of each chunk's rows among those with a coupled part
    for out in embedded:
        end += 0 if out.left is None else len(out.left)
        ends.append(end)
    cached = _coupled(embedded, chunks, coupled, world)
    embed_weight = weights.get("embed", 1.0)
    names = sorted(counts)
    totals = world.sum(torch.tensor([float(counts[n]) for n in names], dtype=torch.float64)).tolist()
    total = {name: max(t, 1.0) for name, t in zip(names, totals)}
    sums: dict[str, torch.Tensor] = {}  # where the model is: each number that a GPU hands over is waited for
    learned = next((number for number, out in enumerate(embedded) if out.left is not None), None)

    def surrogate(number: int, out: Outputs) -> torch.Tensor:
        """The scalar whose gradient is this chunk's part of the loss's."""
        terms = []
        if out.left is not None and out.right is not None:
            assert cached is not None
            rows = slice(ends[number] - len(out.left), ends[number])
            right = cached.right[rows].view_as(out.right)
            both = (out.left * cached.left[rows]).sum() + (out.right * right).sum()
            terms.append(both * (embed_weight * world.size))
            for name, value in out.scalars.items():
                # Once per step, and times 0 in other chunks, so that every backward meets the same parameters.
                terms.append((value * (cached.scalars[name] * embed_weight if number == learned else 0.0)).sum())
        for name, value in out.sums.items():
            terms.append(value * (weights.get(name, 1.0) * world.size / total[name]))
            found = value.detach().double()
            sums[name] = found if name not in sums else sums[name] + found
        return torch.stack(terms).sum()

    if retain:
        backward(surrogate(0, embedded[0]))
    scalars = embedded[learned].scalars if learned is not None else {}
    temperature = (-scalars["log_scale"].detach()).exp() if "log_scale" in scalars else None
    del scalars
    embedded.clear()
    for number in range(int(retain), len(chunks)):
        states[number].restore()
        backward(surrogate(number, forward(chunks[number], True)))
    after.restore()

    metrics: dict[str, torch.Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
    if cached is not None:
        metrics["loss_embed"] = cached.value
        metrics["loss"] = metrics["loss"] + embed_weight * cached.value.double().cpu()
        metrics |= {f"gradient_{name}": value.sum() for name, value in cached.scalars.items()}
        metrics |= {"temperature": temperature.sum()} if temperature is not None else {}
    if names:
        summed = [sums.get(n, torch.zeros((), dtype=torch.float64)).cpu() / total[n] for n in names]
        means = world.sum(torch.stack(summed))
        for name, units, mean in zip(names, totals, means):
            if units:
                metrics[f"loss_{name}"] = mean
                metrics["loss"] = metrics["loss"] + weights.get(name, 1.0) * mean
    return metrics


def _coupled(
    embedded: Sequence[Outputs], chunks: Sequence[Chunk], coupled: Coupled, world: World
) -> CoupledGradient | None:
    """The coupled loss over the chunks that have such a part, without a graph."""
    has = [(out, chunk) for out, chunk in zip(embedded, chunks) if out.left is not None]
    if not has:
        return None
    left = torch.cat([out.left.detach() for out, _ in has])  # type: ignore[union-attr]  # [b, D]
    right = torch.cat([out.right.detach() for out, _ in has])  # type: ignore[union-attr]
    right = right.view(len(left), -1, left.shape[1])  # [b, m, D]
    scalars = {name: value.detach() for name, value in has[0][0].scalars.items()}
    return coupled(left, right, scalars, rows_of([chunk for _, chunk in has], right.shape[1], left.device), world)
