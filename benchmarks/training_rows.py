"""Training: the gradient-cached step against the sum of its parts, and the tiled loss against open_clip's.

The parts of a step are what it cannot do without: every chunk embedded without
a graph, the coupled loss once, every chunk forward and backward. They are
measured by themselves on the same model and batch, so the ratio shows what the
step adds in between. Model and data are those of the tiny recipe, in fp32.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case
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


def _step_and_parts(
    pool: Path, tokenizer: Path, chunk: int, batch: int
) -> tuple[Callable[[], float], Callable[[], float]]:
    """(seconds of one step, seconds of its parts) of the tiny MM-GEM in one process."""
    import torch

    from training.data import Loader, Shards
    from training.distributed import World
    from training.families import build
    from training.gradient_cache import Chunk, Outputs, gradient_cached_step
    from training.objectives.infonce import InfoNCE
    from training.train import parse

    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", str(pool), "--out", str(tokenizer)]
    words += ["--precision", "fp32", "--samples", str(batch), f"--loader.batch={batch}", f"--loader.chunk={chunk}"]
    config, *_ = parse(words)
    shards = Shards(pool)
    family = build(config, tokenizer, shards.every_caption)
    model = family.model
    loader = Loader(shards, config.loader, family.image, family.encode_text, seed=0, rank=0, world_size=1)
    (chunks,) = loader.batches(0, 1)
    tokens = float(sum(model.counts(c)["generate"] for c in chunks))
    coupled, world = InfoNCE(reduction=config.objective.reduction), World()

    def forward(c: Chunk, separable: bool) -> Outputs:
        return Outputs(**model(c, separable=separable))

    def step() -> float:
        model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        gradient_cached_step(
            forward=forward,
            backward=lambda loss: loss.backward(),
            chunks=chunks,
            counts={"generate": tokens},
            weights={"generate": 1.0},
            coupled=coupled,
            world=world,
        )
        return time.perf_counter() - began

    def parts() -> float:
        model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        with torch.no_grad():
            embedded = [forward(c, False) for c in chunks]
        left, right = torch.cat([e.left for e in embedded]), torch.cat([e.right for e in embedded])
        valid = torch.cat([c["valid"] for c in chunks])
        spent = time.perf_counter() - began

        began = time.perf_counter()
        cached = coupled(left, right, embedded[0].log_scale.detach(), valid, world)
        spent += time.perf_counter() - began

        for c, d_left, d_right in zip(chunks, cached.left.split(chunk), cached.right.split(chunk)):
            began = time.perf_counter()
            out = forward(c, True)
            ((out.left * d_left).sum() + (out.right * d_right).sum() + out.sums["generate"] / tokens).backward()
            spent += time.perf_counter() - began
        return spent

    return step, parts


def losses(bench: Bench) -> Iterator[Case]:
    batch = 1_024 if bench.quick else 8_192
    ours, theirs, products = _loss_sides(batch)
    shared: dict[str, Any] = {"area": "training", "better": "lower"}
    clip_loss = f"open_clip ClipLoss forward + backward, B = {batch}, D = {WIDTH}"
    yield Case(
        name="loss_8192_time", unit="s", reach=0.5, peer_name=clip_loss, ours=_timed(ours), peer=_timed(theirs), **shared
    )
    yield Case(
        name="loss_8192_products",
        unit="s",
        reach=1.15,
        peer_name=f"four bare B x B x D products, B = {batch}, D = {WIDTH}",
        ours=_timed(ours),
        peer=_timed(products),
        **shared,
    )
    yield Case(
        name="loss_8192_memory",
        unit="MiB",
        reach=0.1,
        peer_name=clip_loss,
        ours=lambda: _peak("ours", batch),
        peer=lambda: _peak("theirs", batch),
        **shared,
    )


def _loss_sides(batch: int) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """The tiled loss with its gradients, open_clip's with autograd's, and the bare products; the first two agree."""
    import torch
    from open_clip.loss import ClipLoss

    from training.distributed import World
    from training.objectives.infonce import InfoNCE

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.nn.functional.normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(2)
    )
    log_scale = torch.tensor([14.0]).log()
    valid = torch.ones(batch, dtype=torch.bool)
    infonce, clip_loss, world = InfoNCE(reduction="mean"), ClipLoss(), World()

    def ours() -> tuple[float, torch.Tensor]:
        found = infonce(left, right, log_scale, valid, world)
        return float(found.value), found.left

    def theirs() -> tuple[float, torch.Tensor]:
        sides = [x.detach().requires_grad_() for x in (left, right, log_scale)]
        loss = clip_loss(sides[0], sides[1], sides[2].exp())
        loss.backward()
        assert sides[0].grad is not None
        return float(loss), sides[0].grad

    def products() -> None:
        """Row by row of tiles, as the loss does them."""
        for _ in range(2):
            for rows in left.split(infonce.tile):
                s = rows @ right.T
                torch.mm(s, right) if _ else torch.mm(rows, right.T, out=s)
        return None

    (value, gradient), (expected, expected_gradient) = ours(), theirs()
    assert abs(value - expected) < 1e-4 and torch.allclose(gradient, expected_gradient, atol=1e-7, rtol=1e-3)
    return ours, theirs, products


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return once


def _peak(side: str, batch: int) -> float:
    """MiB that the side's peak adds to a fresh process that holds the embeddings."""
    command = [sys.executable, "-m", "benchmarks.training_rows", side, str(batch)]
    return float(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))


def _resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _report_peak(side: str, batch: int) -> None:
    """The first small run loads what torch loads late; then the peak starts anew from what is resident."""
    for work in _loss_sides(256)[:2]:
        work()
