"""Ranks of a training run that wait on their stdin and do a piece of work each time they are asked to.

They are started once, with one thread each, so that either side of a row runs
in turn while the other waits without work. The model is the tiny MM-GEM of the
recipe, in fp32, built, wrapped and stepped as a training run does it. Three
pieces of work:

    step    one of the engine, the optimiser's included
    parts   what a step cannot do without, each timed by itself on the bare model: every chunk embedded without a
            graph, the coupled loss once, every chunk forward and backward, torch's AdamW
    plain   the step of a textbook, on the bare model: one forward of the whole batch, one backward, torch's AdamW
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Ranks:
    """Processes of one training run, ended with the block.

    Args:
        out: folder of the run.
        batch: samples of a global batch · chunk: samples that a rank runs at a time · retain: samples whose graphs
            a rank keeps from the first pass.
        stage: name of a file in ds_configs/.
    """

    def __init__(
        self, pool: Path, out: Path, *, ranks: int, stage: str, batch: int, chunk: int, retain: int = 0
    ) -> None:
        from jobs.launch import held_port

        out.mkdir()
        self._held, self.chunks, self.said = contextlib.ExitStack(), batch // ranks // chunk, out / "said.log"
        command = [sys.executable, "-m", "benchmarks.ranks", str(pool), str(out), stage]
        command += [str(batch), str(chunk), str(retain)]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._held.enter_context(held_port()))}
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
        self._held.close()

    def seconds(self, work: str) -> float:
        """Of one piece of work, on the first rank."""
        return self._ask(work, self.chunks)["seconds"]

    def reduce_scatters(self, chunks: int) -> float:
        """Calls in a step of so many chunks a rank."""
        return self._ask("step", chunks)["reduce_scatters"]

    def _ask(self, work: str, chunks: int) -> dict[str, float]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{work} {chunks}\n")
            process.stdin.flush()
        assert self.processes[0].stdout is not None
        for line in self.processes[0].stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise RuntimeError(self.said.read_text()[-3000:])


def _rank() -> None:
    """One of them: a piece of work for each line of stdin."""
    from training.data import Shards
    from training.distributed import open_group
    from training.loop import make_trainer
    from training.traffic import TRAFFIC
    from training.train import parse, tune_for_cpu

    pool, out, stage, batch, chunk, retain = sys.argv[1:]
    tune_for_cpu("fp32")
    TRAFFIC.install()  # before the process group is opened
    open_group()
    words = ["--config", str(ROOT / "recipes/train/tiny_mmgem.yaml"), "--data", pool, "--out", out]
    words += ["--precision", "fp32", "--deepspeed", f"ds_configs/{stage}.json", "--samples", batch]
    config, *_ = parse([*words, f"--loader.batch={batch}", f"--loader.chunk={chunk}", f"--loader.retain={retain}"])
    trainer = make_trainer(config, Shards(Path(pool)), Path(out))
    (chunks,) = trainer.loader.batches(0, 1)
    bare = Bare(trainer, chunks)
    works = {"step": lambda n: _timed(lambda: trainer.step(0, chunks[:n])), "parts": bare.parts, "plain": bare.plain}
    for line in sys.stdin:
        work, number = line.split()
        trainer.world.barrier()
        TRAFFIC.take()
        seconds = works[work](int(number))
        calls = TRAFFIC.take().get("reduce_scatter_calls", 0.0)
        print(json.dumps({"seconds": seconds, "reduce_scatters": calls}), flush=True)
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


class Bare:
    """The model of a trainer of one rank without ZeRO, and its batch, without the engine."""

    def __init__(self, trainer: Any, chunks: list[dict[str, Any]]) -> None:
        import torch

        from training.objectives import build

        config = trainer.config
        self.model, self.chunks, self.world = trainer.family.model, chunks, trainer.world
        self.tokens = float(sum(self.model.counts(c)["generate"] for c in chunks))  # to be predicted
        self.coupled, self.norm = build(config.objective), config.optim.gradient_clipping
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)  # the weights stay

    def forward(self, chunk: Mapping[str, Any], separable: bool) -> Any:
        from training.gradient_cache import Outputs

        return Outputs(**self.model(chunk, separable=separable))

    def update(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self, _: int) -> float:
        import torch

        from training.objectives.coupled import Rows

        embedded: list[Any] = []

        def embed() -> None:
            with torch.no_grad():
                embedded.extend(self.forward(c, False) for c in self.chunks)

        spent = _timed(embed)
        left, right = torch.cat([e.left for e in embedded]), torch.cat([e.right for e in embedded])
        valid = torch.cat([c["valid"] for c in self.chunks])
        scalars = {name: value.detach() for name, value in embedded[0].scalars.items()}

        began = time.perf_counter()
        cached = self.coupled(left, right[:, None], scalars, Rows(valid, valid[:, None]), self.world)
        spent += time.perf_counter() - began

        size = len(valid) // len(self.chunks)
        for c, d_left, d_right in zip(self.chunks, cached.left.split(size), cached.right[:, 0].split(size)):
            began = time.perf_counter()
            out = self.forward(c, True)
            coupled = (out.left * d_left).sum() + (out.right * d_right).sum()
            (coupled + out.sums["generate"] / self.tokens).backward()
            spent += time.perf_counter() - began
        return spent + _timed(self.update)

    def plain(self, _: int) -> float:
        import torch
        from torch.nn.functional import cross_entropy

        (whole,) = self.chunks

        def step() -> None:
            out = self.forward(whole, True)
            logits = out.scalars["log_scale"].exp() * out.left @ out.right.T
            target = torch.arange(len(logits))
            loss = cross_entropy(logits, target) + cross_entropy(logits.T, target)
            (loss + out.sums["generate"] / self.tokens).backward()
            self.update()

        return _timed(step)


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    _rank()
