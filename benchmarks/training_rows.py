"""Training: the gradient-cached step against the sum of its parts.

The parts of a step are what it cannot do without: every chunk embedded without
a graph, the coupled loss once, every chunk forward and backward. They are
measured by themselves on the same model and batch, so the ratio shows what the
step adds in between. Model and data are those of the tiny recipe, in fp32.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case, Measure
from curation.synth import synthesise

ROOT = Path(__file__).resolve().parent.parent


def steps(bench: Bench) -> Iterator[Case]:
    from training.train import tune_for_cpu

    tune_for_cpu("fp32")
    pool = bench.work / "pool"
    less = 8 if bench.quick else 1
    synthesise(out=pool, pairs=512 // less, seed=0, noise=False)
    for chunk, batch, calls in ((8, 64, 8), (32, 256, 3)):
        whole, parts = _step_and_parts(pool, bench.work / f"tokenizer-{chunk}", chunk // less, batch // less)
        yield Case(
            name=f"step_chunk_{chunk}_of_{batch}",
            area="training",
            unit="s",
            better="lower",
            reach=1.05,
            peer_name="its parts by themselves: embedding, coupled loss, forward + backward of every chunk",
            ours=whole,
            peer=parts,
            calls=1 if bench.quick else calls,
        )
    retained, plain = _step_and_plain(pool, bench.work / "tokenizer-retained", 256 // less)
    yield Case(
        name="step_retained_256",
        area="training",
        unit="s",
        better="lower",
        reach=1.03,
        peer_name="plain full-batch step: one forward, textbook loss, one backward",
        ours=retained,
        peer=plain,
        calls=1 if bench.quick else 3,
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The tiny MM-GEM of the recipe and one batch for it."""

    model: Any
    chunks: list[dict[str, Any]]
    tokens: float  # to be predicted, over the whole batch
    coupled: Any
    world: Any

    def forward(self, chunk: Mapping[str, Any], separable: bool) -> Any:
        from training.gradient_cache import Outputs

        return Outputs(**self.model(chunk, separable=separable))

    def step(self, *, retain: bool) -> float:
        """Seconds of one gradient-cached step."""
        from training.gradient_cache import gradient_cached_step

        self.model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        gradient_cached_step(
            forward=self.forward,
            backward=lambda loss: loss.backward(),
            chunks=self.chunks,
            counts={"generate": self.tokens},
            weights={"generate": 1.0},
            coupled=self.coupled,
            world=self.world,
            retain=retain,
        )
        return time.perf_counter() - began


def subject_of(pool: Path, tokenizer: Path, chunk: int, batch: int) -> Subject:
    from training.data import Loader, Shards
    from training.distributed import World
    from training.families import build
    from training.objectives import build as build_objective
    from training.train import parse

    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", str(pool), "--out", str(tokenizer)]
    words += ["--precision", "fp32", "--samples", str(batch), f"--loader.batch={batch}", f"--loader.chunk={chunk}"]
    config, *_ = parse([*words, "--loader.retain=0"])
    shards = Shards(pool)
    family = build(config, tokenizer, shards.every_caption)
    loader = Loader(shards, config.loader, family.image, family.encode_text, seed=0, rank=0, world_size=1)
    (chunks,) = loader.batches(0, 1)
    return Subject(
        model=family.model,
        chunks=chunks,
        tokens=float(sum(family.model.counts(c)["generate"] for c in chunks)),
        coupled=build_objective(config.objective),
        world=World(),
    )


def _step_and_parts(pool: Path, tokenizer: Path, chunk: int, batch: int) -> tuple[Measure, Measure]:
    """(seconds of one step, seconds of its parts) in one process."""
    import torch

    from training.objectives.coupled import Rows

    subject = subject_of(pool, tokenizer, chunk, batch)
    chunks = subject.chunks

    def parts() -> float:
        subject.model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        with torch.no_grad():
            embedded = [subject.forward(c, False) for c in chunks]
        spent = time.perf_counter() - began
        left, right = torch.cat([e.left for e in embedded]), torch.cat([e.right for e in embedded])
        valid = torch.cat([c["valid"] for c in chunks])

        began = time.perf_counter()
        scalars = {name: value.detach() for name, value in embedded[0].scalars.items()}
        cached = subject.coupled(left, right[:, None], scalars, Rows(valid, valid[:, None]), subject.world)
        spent += time.perf_counter() - began

        for c, d_left, d_right in zip(chunks, cached.left.split(chunk), cached.right[:, 0].split(chunk)):
            began = time.perf_counter()
            out = subject.forward(c, True)
            coupled = (out.left * d_left).sum() + (out.right * d_right).sum()
            (coupled + out.sums["generate"] / subject.tokens).backward()
            spent += time.perf_counter() - began
        return spent

    return lambda: subject.step(retain=False), parts


def _step_and_plain(pool: Path, tokenizer: Path, batch: int) -> tuple[Measure, Measure]:
    """(seconds of a step with room for its whole batch, seconds of the same step written the plain way)."""
    import torch
    from torch.nn.functional import cross_entropy

    subject = subject_of(pool, tokenizer, batch, batch)
    (whole,) = subject.chunks

    def plain() -> float:
        subject.model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        out = subject.forward(whole, True)
        logits = out.scalars["log_scale"].exp() * out.left @ out.right.T
        target = torch.arange(batch)
        loss = cross_entropy(logits, target) + cross_entropy(logits.T, target)
        (loss + out.sums["generate"] / subject.tokens).backward()
        return time.perf_counter() - began

    return lambda: subject.step(retain=True), plain
