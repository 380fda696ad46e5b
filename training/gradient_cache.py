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
from training.objectives.coupled import Coupled, Rows

Chunk = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Outputs:
    """What a model says of one chunk.

    left, right: unit embeddings of the pair's sides, fp32 [c, D] · log_scale: [1] ·
    sums: separable losses summed over their units (tokens, samples) [].
    """

    left: torch.Tensor
    right: torch.Tensor
    log_scale: torch.Tensor
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
        forward: (chunk, separable) -> Outputs; `separable` asks for the sums.
        backward: back-propagates a scalar, e.g. `engine.backward`.
        chunks: this rank's part of the batch; every rank has as many chunks. `chunk["valid"]`
            is bool [c]: rows that count.
        counts: units of each separable sum on this rank (tokens to be predicted, ...).
        weights: of the separable losses.
        retain: keep the first chunk's graph from the first pass.

    Returns:
        The global "loss", "loss_embed", "loss_<separable>", the "temperature" that was used and
        "gradient_log_scale", each [].
    """
    states: list[Replay] = []
    embedded: list[Outputs] = []
    for number, chunk in enumerate(chunks):
        states.append(Replay())
        kept = retain and number == 0
        with torch.set_grad_enabled(kept):
            embedded.append(forward(chunk, kept))
    after = Replay()
    left = torch.cat([e.left.detach() for e in embedded])
    right = torch.cat([e.right.detach() for e in embedded])
    log_scale = embedded[0].log_scale.detach().float()
    valid = torch.cat([c["valid"] for c in chunks])
    cached = coupled(left, right[:, None], {"log_scale": log_scale}, Rows(valid, valid[:, None]), world)
    cached_right, d_log_scale = cached.right[:, 0], cached.scalars["log_scale"]
    names = sorted(counts)
    totals = world.sum(torch.tensor([float(counts[n]) for n in names], dtype=torch.float64))
    total = {name: max(float(t), 1.0) for name, t in zip(names, totals)}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    ends = torch.tensor([len(c["valid"]) for c in chunks]).cumsum(0).tolist()

    def surrogate(number: int, out: Outputs) -> torch.Tensor:
        """The scalar whose gradient is this chunk's part of the loss's."""
        rows = slice(ends[number] - out.left.shape[0], ends[number])
        scalar = ((out.left * cached.left[rows]).sum() + (out.right * cached_right[rows]).sum()) * world.size
        # Once per step, and times 0 in other chunks, so that every backward meets the same parameters on every rank.
        scalar = scalar + (out.log_scale * (d_log_scale if number == 0 else 0.0)).sum()
        for name, value in out.sums.items():
            scalar = scalar + value * (weights[name] * world.size / total[name])
            sums[name] += value.detach().double().cpu()
        return scalar

    if retain:
        backward(surrogate(0, embedded[0]))
    embedded.clear()
    for number in range(int(retain), len(chunks)):
        states[number].restore()
        backward(surrogate(number, forward(chunks[number], True)))
    after.restore()

    metrics = {"loss_embed": cached.value, "gradient_log_scale": d_log_scale[0], "temperature": (-log_scale).exp()}
    means = world.sum(torch.stack([sums[n] / total[n] for n in names])) if names else ()
    metrics |= {f"loss_{name}": mean for name, mean in zip(names, means)}
    metrics["loss"] = cached.value + sum(weights[n] * float(metrics[f"loss_{n}"]) for n in names)
    return metrics
