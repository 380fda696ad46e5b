"""Training: the tiled loss against open_clip's and against the matrix products that it cannot do without.

Time is taken side by side in this process; memory is what one call adds, at its
peak, to a fresh process that holds the embeddings.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 512


def losses(bench: Bench) -> Iterator[Case]:
    batch, large = (1_024, 2_048) if bench.quick else (8_192, 32_768)
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
    yield Case(
        name="loss_32768_memory",
        unit="MiB",
        reach=1 / 50,
        peer_name=f"what open_clip ClipLoss holds by formula, B = {large}, D = {WIDTH}",
        ours=lambda: _peak_of("ours", large),
        peer=lambda: clip_loss_need(large),
        **shared,
    )
    yield Case(
        name="loss_doubled_batch",
        unit="MiB",
        reach=2.1,
        peer_name=f"itself at half the batch of {large}, same tile",
        ours=lambda: _peak_of("ours", large),
        peer=lambda: _peak_of("ours", large // 2),
        **shared,
    )


def clip_loss_need(batch: int) -> float:
    """MiB of four [B, B] fp32 matrices, the least that autograd holds at once, and of the embeddings' gradients.

    The four are each direction's logits, or in the backward their gradients, and each one's saved log-softmax. What
    the process row shows at B = 8,192 is more than this.
    """
    return (4 * batch * batch + 2 * batch * WIDTH) * 4 / 2**20


def loss_sides(batch: int) -> dict[str, Callable[[], Any]]:
    """The tiled loss and open_clip's, each giving (value, gradient of the left side), and the bare products."""
    import torch
    from open_clip.loss import ClipLoss
    from torch.nn.functional import normalize

    from training.distributed import World
    from training.objectives.coupled import Rows
    from training.objectives.infonce import InfoNCE

    generator = torch.Generator().manual_seed(0)
    left, right = (normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(2))
    log_scale = torch.tensor([14.0]).log()
    valid = torch.ones(batch, dtype=torch.bool)
    rows = Rows(valid, valid[:, None])
    infonce, clip_loss, world = InfoNCE(reduction="mean"), ClipLoss(), World()

    def ours() -> tuple[float, torch.Tensor]:
        found = infonce(left, right[:, None], {"log_scale": log_scale}, rows, world)
        return float(found.value), found.left

    def theirs() -> tuple[float, torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (left, right, log_scale)]
        loss = clip_loss(leaves[0], leaves[1], leaves[2].exp())
        loss.backward()
        assert leaves[0].grad is not None
        return float(loss.detach()), leaves[0].grad

    def products() -> None:
        """S twice, once for its sums and once for its gradient, which then meets either side; tile by tile."""
        tiles = [slice(i, min(i + infonce.tile, batch)) for i in range(0, batch, infonce.tile)]
        s = torch.empty(min(infonce.tile, batch), min(infonce.tile, batch))
        d_left, d_right = torch.zeros_like(left), torch.zeros_like(right)
        for columns in tiles:
            for rows in tiles:
                torch.mm(left[rows], right[columns].T, out=s)
        for columns in tiles:
            for rows in tiles:
                torch.mm(left[rows], right[columns].T, out=s)
                d_left[rows].addmm_(s, right[columns])
                d_right[columns].addmm_(s.T, left[rows])

    return {"ours": ours, "clip_loss": theirs, "products": products}


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return once


def _peak_of(side: str, batch: int) -> float:
    command = [sys.executable, "-m", "benchmarks.loss_rows", side, str(batch)]
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
