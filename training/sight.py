"""Everything a run is watched by, in one place that the loop calls once a step.

    with Sight(config, run, world, device, flops, start=step) as sight:
        for chunks in sight.waiting(loader.batches(...)):     # times the wait for data
            metrics = trainer.step(...)
            sight.step(number, metrics, ...)                  # a line every `log_every` steps

A rank keeps its own figures; every `log_every` steps they are gathered in one
collective, so that each rank knows those of all and rank 0 writes them. Time and
traffic are those of steps: saving a checkpoint between two of them is in neither.
"""

import logging
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from training import bottleneck
from training.config import TrainConfig, as_dict
from training.distributed import World
from training.flops import FlopMeter, measured_peak
from training.log import RunLog, open_rank_log
from training.profiler import Profiler
from training.traffic import TRAFFIC
from training.watchdog import Watchdog

T = TypeVar("T")

JUDGED_STEPS = 20
"""Steps that the wait for data is judged over."""
SILENCE = 600.0
"""Seconds between two warnings of slow data."""


@dataclass(slots=True)
class Window:
    """What has gathered since the last line. seconds: of the loader's parts."""

    steps: int = 0
    waited: float = 0.0
    spent: float = 0.0
    traffic: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


class Sight:
    """The figures of one rank's run.

    Args:
        flops: counts the work of the steps, and is called by them.
        start: step that the run begins or resumes after.
    """

    def __init__(
        self, config: TrainConfig, run: Path, world: World, device: torch.device, flops: FlopMeter, *, start: int
    ) -> None:
        self.config, self.world, self.device, self.flops, self.done = config, world, device, flops, start
        stream = open_rank_log(run, world.rank)
        self.log = world.first(lambda: RunLog(run, start, config.steps, wandb=config.log.wandb, config=as_dict(config)))
        self.profiler = Profiler(config.log.profile_steps if world.rank == 0 else None, run / "profile")
        self.watchdog = Watchdog(run / "ranks", world.rank, world.size, config.log.hang_seconds, stream, self._say)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.peak = measured_peak(device, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        logging.getLogger("gemsmith").warning(
            "rank %d of %d on %s after step %d: products reach %.1f GFLOP/s in %s",
            *(world.rank, world.size, device, start, self.peak / 1e9, dtype),
        )
        self.window = Window()
        self.judged: Window | None = None  # begins after the first line: the first step finds an empty loader
        self.loader_seconds: dict[str, float] = {}
        self.asked, self.warned = 0.0, -SILENCE

    def __enter__(self) -> "Sight":
        self.watchdog.start(self.done)
        return self

    def __exit__(self, *_: Any) -> None:
        self.watchdog.stop()
        self.profiler.end()
        if self.log is not None:
            self.log.close()

    def _say(self, line: str) -> None:
        if self.log is not None:
            self.log.say(line)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each comes is waiting for data."""
        items = iter(batches)
        while True:
            TRAFFIC.take()  # what passed between two steps is not theirs
            self.watchdog.beat(self.done, "waiting for data")
            self.asked = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            self.window.waited += time.monotonic() - self.asked
            self.watchdog.phase = "computing"
            self.profiler.begin(self.done + 1)
            yield item

    def step(
        self,
        number: int,
        metrics: Mapping[str, float],
        *,
        draws: int,
        errors: Mapping[str, int],
        seconds: Mapping[str, float],
        groups: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any] | None:
        """Step `number` (from 1) has ended. On every `log_every`-th, and the last: the line that was logged.

        Args:
            metrics: global already; go into the line as they are.
            draws: sum of this rank's `draws` (Loader); over all ranks it says which samples the step saw, and when.
            errors: this rank's broken samples so far, by reason.
            seconds: of the loader's parts so far, over its threads (bottleneck.Timers).
            groups: the optimiser's parameter groups.
        """
        self.done, window = number, self.window
        self.watchdog.beat(number, "between two steps")
        self.profiler.end(number)
        window.steps += 1
        window.spent += time.monotonic() - self.asked
        window.traffic.update(TRAFFIC.take())
        if number % self.config.log_every and number != self.config.steps:
            return None
        now = dict(seconds)
        window.seconds.update({part: s - self.loader_seconds.get(part, 0.0) for part, s in now.items()})
        self.loader_seconds, self.window = now, Window()
        useful, executed = self.flops.take()
        mine = {
            "waited": window.waited,
            "spent": window.spent,
            "useful": useful,
            "executed": executed,
            "peak": self.peak,
            "memory": _peak_memory(self.device),
            "draws": draws,
            "errors": dict(errors),
            "seconds": dict(window.seconds),
        }
        everyone = _everyone(mine, self.world)
        record = {
            "samples": number * self.config.loader.batch,
            "batch_id": f"{sum(r['draws'] for r in everyone) % 2**64:016x}",
            **metrics,
            **{f"lr_{name}": lr for name, lr in learning_rates(groups).items()},
            **summary(everyone),
            "samples_per_second": window.steps * self.config.loader.batch / max(r["spent"] for r in everyone),
            **{f"{kind}_gflop": sum(r[kind] for r in everyone) / window.steps / 1e9 for kind in ("useful", "executed")},
            **{name: value / window.steps for name, value in window.traffic.items()},
        }
        self._judge(everyone, window)
        self.world.first(lambda: self._write(number, record))
        return record

    def _write(self, number: int, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log(number, record)

    def _judge(self, everyone: list[dict[str, Any]], window: Window) -> None:
        """Warn where the training has waited for data."""
        if self.judged is not None:
            slowest = max(everyone, key=lambda r: r["waited"])  # the others wait for it in a collective
            self.judged.waited += slowest["waited"]
            self.judged.spent += slowest["spent"]
            self.judged.seconds.update(Counter(slowest["seconds"]))
            self.judged.steps += window.steps
            if self.judged.steps < JUDGED_STEPS:
                return
            judged, (threads, bound) = self.judged, (self.config.loader.threads, self.config.log.max_data_share)
            line = bottleneck.warning(judged.waited, judged.spent, judged.seconds, threads, bound)
            if line is not None and time.monotonic() - self.warned > SILENCE:
                self.warned = time.monotonic()
                self._say(f"warning: {line}")
        self.judged = Window()


def summary(everyone: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all ranks as one: shares of the slowest, memory of the largest, work against all their peaks."""
    capacity = sum(r["peak"] * r["spent"] for r in everyone)
    errors = sum((Counter(r["errors"]) for r in everyone), Counter[str]())
    return {
        "data_share": max(r["waited"] / r["spent"] for r in everyone),
        "mfu": sum(r["useful"] for r in everyone) / capacity,
        "hfu": sum(r["executed"] for r in everyone) / capacity,
        "peak_gflops": sum(r["peak"] for r in everyone) / len(everyone) / 1e9,
        "memory_mib": max(r["memory"] for r in everyone) / 2**20,
        "errors": errors.total(),
        "errors_by_reason": dict(errors),
    }


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By the group's name, or its number where it has none."""
    return {str(group.get("name", number)): float(group["lr"]) for number, group in enumerate(groups)}


def _everyone(mine: dict[str, Any], world: World) -> list[dict[str, Any]]:
    """Every rank's figures, in rank order, on every rank."""
    if world.size == 1:
        return [mine]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, mine)
    return found


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch has allocated on a GPU at most, else the largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
