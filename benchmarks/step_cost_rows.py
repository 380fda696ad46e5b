"""Training: what a gradient-cached step holds as its batch grows. Counts, no times.

Held are the bytes of the storages that autograd saves, at their peak, without
those of parameters, inputs and the embeddings' gradients. The larger batch is
the smaller one's chunks over and over, so that it differs in their number alone.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case
from benchmarks.ranks import ROOT
from curation.synth import synthesise

Coupled = Callable[..., Any]


def step_memory(bench: Bench) -> Iterator[Case]:
    chunk, batch, larger = (8, 16, 64) if bench.quick else (32, 256, 4_096)
    pool = bench.work / "pool"
    synthesise(out=pool, pairs=2 * batch, seed=0, noise=False)
    small = subject_of(pool, bench.work / "tokenizer", chunk, batch)
    times = larger // batch
    large = replace(small, chunks=small.chunks * times, tokens=small.tokens * times)
    yield Case(
        name="activation_memory",
        area="training",
        unit="MiB",
        better="lower",
        reach=1.1,
        peer_name=f"itself at B = {batch} instead of {larger}, chunks of {chunk}",
        ours=functools.cache(lambda: _held(large)),  # the same in every run
        peer=functools.cache(lambda: _held(small)),
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The tiny MM-GEM of the recipe, in fp32, and one batch for it."""

    model: Any
    chunks: list[dict[str, Any]]
    tokens: float  # to be predicted, over the whole batch
    coupled: Coupled

    def forward(self, chunk: Mapping[str, Any], separable: bool) -> Any:
        from training.gradient_cache import Outputs

        return Outputs(**self.model(chunk, separable=separable))

    def step(self, coupled: Coupled) -> None:
        """One gradient-cached step."""
        from training.distributed import World
        from training.gradient_cache import gradient_cached_step

        self.model.zero_grad(set_to_none=False)
        gradient_cached_step(
            forward=self.forward,
            backward=lambda loss: loss.backward(),
            chunks=self.chunks,
            counts={"generate": self.tokens},
            weights={"generate": 1.0},
            coupled=coupled,
            world=World(),
            retain=False,
        )


def subject_of(pool: Path, tokenizer: Path, chunk: int, batch: int) -> Subject:
    from training.data import Loader, Shards
    from training.families import build
    from training.objectives import build as build_objective
    from training.train import parse, tune_for_cpu

    tune_for_cpu("fp32")
    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", str(pool), "--out", str(tokenizer)]
    words += ["--precision", "fp32", "--samples", str(batch), f"--loader.batch={batch}", f"--loader.chunk={chunk}"]
    config, *_ = parse([*words, "--loader.retain=0"])
    shards = Shards(pool)
    family = build(config, tokenizer, shards.every_caption)
    loader = Loader(shards, config.loader, family.image, family.encode_text, seed=0, rank=0, world_size=1)
    (chunks,) = loader.batches(0, 1)
    tokens = float(sum(family.model.counts(c)["generate"] for c in chunks))
    return Subject(model=family.model, chunks=chunks, tokens=tokens, coupled=build_objective(config.objective))


def _held(subject: Subject) -> float:
    """MiB, at most, during one step."""
    inputs = [x for chunk in subject.chunks for x in chunk.values()]
    return saved_peak(subject.step, subject.coupled, [*subject.model.parameters(), *inputs]) / 2**20


def saved_peak(step: Callable[[Coupled], Any], coupled: Coupled, ignored: Iterable[Any]) -> int:
    """Bytes that autograd saves at most during `step(coupled)`, beyond the tensors `ignored` and what `coupled` gives
    as the embeddings' gradients."""
    import torch

    held: Counter[int] = Counter()  # storage: saved tensors in it
    total = peak = 0
    others = {x.untyped_storage().data_ptr() for x in ignored}

    class Saved:
        def __init__(self, tensor: Any) -> None:
            nonlocal total, peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            if self.key not in others:
                held[self.key] += 1
                total += tensor.untyped_storage().nbytes() if held[self.key] == 1 else 0
                peak = max(peak, total)

        def __del__(self) -> None:
            nonlocal total
            if self.key not in others:
                held[self.key] -= 1
                total -= self.tensor.untyped_storage().nbytes() if not held[self.key] else 0

    def seen(*args: Any) -> Any:
        found = coupled(*args)
        others.update(x.untyped_storage().data_ptr() for x in (found.left, found.right))
        return found

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step(seen)
    assert peak > 0 and total == 0, "the step ends with nothing held"
    return peak
