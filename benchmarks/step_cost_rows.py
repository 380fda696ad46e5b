"""Training: what a gradient-cached step holds as its batch grows, and what it sends as its chunks do. Counts, no times.

Held: bytes of the storages that autograd saves, at their peak, without those
of parameters, inputs and the embeddings' gradients. The larger batch is the
smaller one's chunks over and over, so that it differs in their number alone.

Sent: reduce-scatters of one ZeRO-3 step on two ranks, the loss's own among them.
Gradients are added up in fp32 where ZeRO keeps them, in parts, so every chunk
reduces. DeepSpeed can wait for the last chunk, but then holds whole gradients,
in the parameters' precision.
"""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case
from benchmarks.training_rows import ROOT, Subject, subject_of
from curation.synth import synthesise

RANK_BATCH = 32


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
        ours=functools.cache(lambda: saved_peak(large)),  # the same in every run
        peer=functools.cache(lambda: saved_peak(small)),
    )


def saved_peak(subject: Subject) -> float:
    """MiB that autograd saves at most during one step, beyond parameters, inputs and embeddings."""
    import torch

    held: Counter[int] = Counter()  # storage: saved tensors in it
    total = peak = 0
    ignored = {x.untyped_storage().data_ptr() for x in subject.model.parameters()}
    ignored |= {x.untyped_storage().data_ptr() for chunk in subject.chunks for x in chunk.values()}

    class Saved:
        def __init__(self, tensor: Any) -> None:
            nonlocal total, peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            if self.key not in ignored:
                held[self.key] += 1
                total += tensor.untyped_storage().nbytes() if held[self.key] == 1 else 0
                peak = max(peak, total)

        def __del__(self) -> None:
            nonlocal total
            if self.key not in ignored:
                held[self.key] -= 1
                total -= self.tensor.untyped_storage().nbytes() if not held[self.key] else 0

    def coupled(*args: Any) -> Any:
        found = subject.coupled(*args)
        ignored.update(x.untyped_storage().data_ptr() for x in (found.left, found.right))
        return found

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        replace(subject, coupled=coupled).step(retain=False)
    assert peak > 0 and total == 0, "the step ends with nothing held"
    return peak / 2**20


def step_traffic(bench: Bench) -> Iterator[Case]:
    chunks = few, many = "2", "8"
    pool = bench.work / "pool"
    synthesise(out=pool, pairs=2 * RANK_BATCH, seed=0, noise=False)

    @functools.cache
    def calls() -> dict[str, float]:
        """Of a step, by the number of its chunks, as the first of two ranks counts them."""
        from jobs.launch import free_port

        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
        command += [str(free_port()), "--module", "benchmarks.step_cost_rows", str(pool), str(bench.work), *chunks]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = bench.work / "calls.json"
        assert found.exists(), done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(found.read_text())

    yield Case(
        name="reduce_scatters",
        area="training",
        unit="calls",
        better="lower",
        reach=1.0,
        peer_name=f"itself in {few} chunks instead of {many}, ZeRO-3 on two ranks, fp32",
        ours=lambda: calls()[many],
        peer=lambda: calls()[few],
    )


def _rank() -> None:
    """One of the two ranks: a step for each number of chunks."""
    from training.data import Shards
    from training.distributed import open_group
    from training.loop import make_trainer, settle_retention
    from training.traffic import TRAFFIC
    from training.train import parse, tune_for_cpu

    pool, out, *numbers = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    tune_for_cpu("fp32")
    TRAFFIC.install()  # before the process group is opened
    open_group()
    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", pool, "--out", out]
    words += ["--precision", "fp32", "--samples", str(2 * RANK_BATCH), f"--loader.batch={2 * RANK_BATCH}"]
    config, *_ = parse([*words, f"--loader.chunk={RANK_BATCH // max(map(int, numbers))}", "--loader.retain=0"])
    trainer = make_trainer(config, Shards(Path(pool)), Path(out))
    settle_retention(trainer, None)
    (chunks,) = trainer.loader.batches(0, 1)
    found = {}
    for number in numbers:
        TRAFFIC.take()
        trainer.step(0, chunks[: int(number)])
        found[number] = TRAFFIC.take()["reduce_scatter_calls"]
    if trainer.world.rank == 0:
        (Path(out) / "calls.json").write_text(json.dumps(found))
    trainer.world.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _rank()
