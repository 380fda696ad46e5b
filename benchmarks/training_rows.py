"""Training: the gradient-cached step against the sum of its parts, and the tiled loss against open_clip's.

The parts of a step are what it cannot do without: every chunk embedded without
a graph, the coupled loss once, every chunk forward and backward. They are
measured by themselves on the same model and batch, so the ratio shows what the
step adds in between. Model and data are those of the tiny recipe, in fp32.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case, Measure
from curation.synth import synthesise

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 512


def steps(bench: Bench) -> Iterator[Case]:
    from training.train import tune_for_cpu

    tune_for_cpu()
    pool = bench.work / "pool"
    synthesise(out=pool, pairs=512, seed=0, noise=False)
    for chunk, batch in ((8, 64), (32, 256)):
        whole, parts = _step_and_parts(pool, bench.work / f"tokenizer-{chunk}", chunk, batch)
        yield Case(
            name=f"step_chunk_{chunk}_of_{batch}",
            area="training",
            unit="s",
            better="lower",
            reach=1.05,
            peer_name="its parts by themselves: embedding, coupled loss, forward + backward of every chunk",
            ours=whole,
            peer=parts,
        )
    retained, plain = _step_and_plain(pool, bench.work / "tokenizer-retained", 256)
    yield Case(
        name="step_retained_256",
        area="training",
        unit="s",
        better="lower",
        reach=1.03,
        peer_name="plain full-batch step: one forward, textbook loss, one backward",
        ours=retained,
        peer=plain,
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


def _subject(pool: Path, tokenizer: Path, chunk: int, batch: int) -> Subject:
    from training.data import Loader, Shards
    from training.distributed import World
    from training.families import build
    from training.objectives.infonce import InfoNCE
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
        coupled=InfoNCE(reduction=config.objective.reduction),
        world=World(),
    )


def _step_and_parts(pool: Path, tokenizer: Path, chunk: int, batch: int) -> tuple[Measure, Measure]:
    """(seconds of one step, seconds of its parts) in one process."""
    import torch

    subject = _subject(pool, tokenizer, chunk, batch)
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
        cached = subject.coupled(left, right, embedded[0].log_scale.detach(), valid, subject.world)
        spent += time.perf_counter() - began

        for c, d_left, d_right in zip(chunks, cached.left.split(chunk), cached.right.split(chunk)):
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

    subject = _subject(pool, tokenizer, batch, batch)
    (whole,) = subject.chunks

    def plain() -> float:
        subject.model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        out = subject.forward(whole, True)
        logits = out.log_scale.exp() * out.left @ out.right.T
        target = torch.arange(batch)
        loss = cross_entropy(logits, target) + cross_entropy(logits.T, target)
        (loss + out.sums["generate"] / subject.tokens).backward()
        return time.perf_counter() - began

    return lambda: subject.step(retain=True), plain


def losses(bench: Bench) -> Iterator[Case]:
    batch = 1_024 if bench.quick else 8_192
    sides = loss_sides(batch)
    (value, gradient), (expected, expected_gradient) = sides["ours"](), sides["clip_loss"]()
    assert abs(value - expected) < 1e-4 and (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    of = f"B = {batch}, D = {WIDTH}"
    clip_loss = f"open_clip ClipLoss forward + backward, {of}"
    shared: dict[str, Any] = {"area": "training", "better": "lower"}
    ours, theirs, products = (_timed(sides[name]) for name in ("ours", "clip_loss", "products"))
    yield Case(name="loss_8192_time", unit="s", reach=0.5, peer_name=clip_loss, ours=ours, peer=theirs, **shared)
    bare = f"the four bare products, {of}"
    yield Case(name="loss_8192_products", unit="s", reach=1.15, peer_name=bare, ours=ours, peer=products, **shared)
    yield Case(
        name="loss_8192_memory",
        unit="MiB",
        reach=0.1,
        peer_name=clip_loss,
        ours=lambda: _peak_of("ours", batch),
        peer=lambda: _peak_of("clip_loss", batch),
        **shared,
    )


def loss_sides(batch: int) -> dict[str, Callable[[], Any]]:
    """The tiled loss and open_clip's, each giving (value, gradient of the left side), and the bare products."""
    import torch
    from open_clip.loss import ClipLoss
    from torch.nn.functional import normalize

    from training.distributed import World
    from training.objectives.infonce import InfoNCE

    generator = torch.Generator().manual_seed(0)
    left, right = (normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(2))
    log_scale = torch.tensor([14.0]).log()
    valid = torch.ones(batch, dtype=torch.bool)
    infonce, clip_loss, world = InfoNCE(reduction="mean"), ClipLoss(), World()

    def ours() -> tuple[float, torch.Tensor]:
        found = infonce(left, right, log_scale, valid, world)
        return float(found.value), found.left

    def theirs() -> tuple[float, torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (left, right, log_scale)]
        loss = clip_loss(leaves[0], leaves[1], leaves[2].exp())
        loss.backward()
        assert leaves[0].grad is not None
        return float(loss.detach()), leaves[0].grad

    def products() -> None:
        """S twice, once for its sums and once for its gradient, which then meets either side; tile by tile."""
        s = torch.empty(min(infonce.tile, batch), batch)
        d_left, d_right = torch.empty_like(left), torch.zeros_like(right)
        tiles = [slice(i, min(i + infonce.tile, batch)) for i in range(0, batch, infonce.tile)]
        for rows in tiles:
            torch.mm(left[rows], right.T, out=s[: rows.stop - rows.start])
        for rows in tiles:
            tile = torch.mm(left[rows], right.T, out=s[: rows.stop - rows.start])
            torch.mm(tile, right, out=d_left[rows])
            d_right.addmm_(tile.T, left[rows])

    return {"ours": ours, "clip_loss": theirs, "products": products}


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return once


def _peak_of(side: str, batch: int) -> float:
    """MiB that one call of the side adds, at its peak, to a fresh process that holds the embeddings."""
    command = [sys.executable, "-m", "benchmarks.training_rows", side, str(batch)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def _added_peak(side: str, batch: int) -> float:
    loss_sides(64)[side]()  # what torch loads at its first use is not the loss's
    work = loss_sides(batch)[side]
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A field of this process's status, MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(_added_peak(sys.argv[1], int(sys.argv[2])))
