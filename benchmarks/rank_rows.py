"""Training on ranks: a step under ZeRO-3 on two, what it sends as its chunks grow, how long it waits for data.

The ranks of a row are started once, with one thread each, and take a step each
time they are asked to; so either side of a row runs in turn while the other
waits without work. Steps are whole ones of the engine, the optimiser's
included, on the tiny recipe's model in fp32.

Gradients of chunks are summed on their rank in fp32 and reduced once a step
(`reduce_gradients: step`), so the reduce-scatters, the loss's own among them,
do not grow with the chunks.

The wait for data is that of the demo's own training, through the launcher, cut
to fewer steps and with a ViT of the scorer's sizes in place of the scorer's:
what metrics.jsonl says of it, over all of its steps.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case
from benchmarks.training_rows import ROOT
from curation.synth import synthesise

SCORERS_VIT = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4}
REACH_ZERO3 = 1.0
"""Two ranks should not be slower than one process, on two cores."""


class Ranks:
    """Processes of one training run, ended with the block.

    Args:
        out: folder of the run.
        batch: samples of a global batch · chunk: samples that a rank runs at a time.
        stage: name of a file in ds_configs/.
    """

    def __init__(self, pool: Path, out: Path, *, ranks: int, stage: str, batch: int, chunk: int) -> None:
        from jobs.launch import free_port

        out.mkdir()
        port, self.chunks, self.said = str(free_port()), batch // ranks // chunk, out / "said.log"
        command = [sys.executable, "-m", "benchmarks.rank_rows", str(pool), str(out), stage, str(batch), str(chunk)]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes: list[subprocess.Popen[str]] = []
        with open(self.said, "w") as log:
            for rank in range(ranks):
                env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE if rank == 0 else log}
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=log, text=True, **pipes))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()

    def step(self, chunks: int | None = None) -> dict[str, float]:
        """Seconds and reduce-scatters of one step, of so many of the chunks (all), as the first rank counts them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{chunks or self.chunks}\n")
            process.stdin.flush()
        assert self.processes[0].stdout is not None
        for line in self.processes[0].stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise RuntimeError(self.said.read_text()[-3000:])


def _rank() -> None:
    """One of them: a step for each line of stdin."""
    from training.data import Shards
    from training.distributed import open_group
    from training.loop import make_trainer
    from training.traffic import TRAFFIC
    from training.train import parse, tune_for_cpu

    pool, out, stage, batch, chunk = sys.argv[1:]
    tune_for_cpu("fp32")
    TRAFFIC.install()  # before the process group is opened
    open_group()
    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", pool, "--out", out]
    words += ["--precision", "fp32", "--deepspeed", f"ds_configs/{stage}.json", "--samples", batch]
    config, *_ = parse([*words, f"--loader.batch={batch}", f"--loader.chunk={chunk}", "--loader.retain=0"])
    trainer = make_trainer(config, Shards(Path(pool)), Path(out))
    (chunks,) = trainer.loader.batches(0, 1)
    for line in sys.stdin:
        trainer.world.barrier()
        TRAFFIC.take()
        began = time.perf_counter()
        trainer.step(0, chunks[: int(line)])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "calls": TRAFFIC.take().get("reduce_scatter_calls", 0.0)}), flush=True)
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


def steps_on_ranks(bench: Bench) -> Iterator[Case]:
    batch, chunk = (32, 4) if bench.quick else (256, 32)
    pool = bench.work / "pool"
    synthesise(out=pool, pairs=2 * batch, seed=0, noise=False)
    with (
        Ranks(pool, bench.work / "two", ranks=2, stage="zero3", batch=batch, chunk=chunk) as two,
        Ranks(pool, bench.work / "one", ranks=1, stage="zero0", batch=batch, chunk=chunk) as one,
    ):
        yield Case(
            name="step_zero3",
            area="training",
            unit="s",
            better="lower",
            reach=REACH_ZERO3,
            peer_name=f"the same step in one process without ZeRO, chunks of {chunk} of {batch}",
            ours=lambda: two.step()["seconds"],
            peer=lambda: one.step()["seconds"],
        )
        few, many = two.chunks // 2, two.chunks
        yield Case(
            name="reduce_scatters",
            area="training",
            unit="calls",
            better="lower",
            reach=1.0,
            peer_name=f"itself in {few} chunks instead of {many}, ZeRO-3 on two ranks, fp32",
            ours=lambda: two.step(many)["calls"],
            peer=lambda: two.step(few)["calls"],
        )


def data_share(bench: Bench) -> Iterator[Case]:
    import yaml

    from jobs.demo import RECIPE
    from jobs.launch import free_port
    from jobs.steps import precision, tool

    batch, steps = (32, 2) if bench.quick else (128, 30)
    pool, recipe, number = bench.work / "pool", bench.work / "recipe.yaml", itertools.count()
    synthesise(out=pool, pairs=batch * steps, seed=0, noise=False)  # as in the demo, no picture is seen twice
    demo = yaml.safe_load((ROOT / RECIPE).read_text())
    del demo["mmgem"]["vision"]["arch"]
    demo["mmgem"]["vision"] |= SCORERS_VIT
    recipe.write_text(yaml.safe_dump(demo))

    def share() -> float:
        run = bench.work / f"run-{next(number)}"
        words = [tool("deepspeed"), "--num_accelerators", 2, "--master_port", free_port(), "training/train.py"]
        words += ["--config", recipe, "--precision", precision(), "--samples", batch * steps, "--loader.batch", batch]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*map(str, words), "--data", str(pool), "--out", str(run)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (run / "manifest.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
        return _share(run / "metrics.jsonl")

    yield Case(
        name="data_share",
        area="training",
        unit="of the time",
        better="lower",
        reach=0.05,
        peer_name=f"all the time of the demo's training, {steps} steps of {batch} on two ranks",
        ours=share,
        peer=lambda: 1.0,
    )


def _share(metrics: Path) -> float:
    """The part of a run's steps that the slowest rank waited for data."""
    waited = spent = 0.0
    samples = 0
    for line in map(json.loads, metrics.read_text().splitlines()):
        seconds = (line["samples"] - samples) / line["samples_per_second"]
        waited, spent, samples = waited + line["data_share"] * seconds, spent + seconds, line["samples"]
    return waited / spent


if __name__ == "__main__":
    _rank()
