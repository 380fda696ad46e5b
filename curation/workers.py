"""Ray, as curation uses it: a few actors, an item in work and one waiting for each, results in any order.

An actor loads its models once, and finds its next item waiting when it has
answered the last one, but near the end, where items wait for whoever is free.
An actor gets its first item when it has started: on a cluster with fewer CPUs
than --workers some do not, or only when the cluster has grown.
That is all the scheduling that units of a thousand samples need, and it has
none of Ray Data's object-store traffic or its starvation when the actors take
every CPU. Instead of an actor that is lost (killed, or with its node) another is
asked for, and its items go to whoever is there first: where the cluster has
shrunk there may be no CPU for it, and Ray's own restart would hold the items
until there is. Items write their own output atomically, so doing one twice is
harmless. What kills every worker that it is given to ends the run, by name.
"""

import logging
import math
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from curation.errors import UserError, one_line

RETRIES = 5  # per item; one that loses its worker more often gets as many alone, and is then named
LOST_SECONDS = 600.0  # in which one of the workers asked for again starts, where all that there were have been lost
SHARERS = 4  # workers of one GPU, at most: each holds its models there, and one CPU decodes less than a GPU takes
OBJECT_STORE_BYTES = 200 << 20  # pixels never enter it
REPORT_SECONDS = 5.0
SILENT_SECONDS = 30.0


class Workers:
    """A context manager that holds Ray: a local one of `count` workers, or the cluster at `address`.

    Ray is started by the first `map`, so a run that finds everything done never starts it.
    """

    def __init__(self, count: int | None, address: str | None) -> None:
        if count is not None and count < 1:
            raise UserError(f"--workers {count}: at least 1")
        self._count = count
        self._address = address
        self._started = False
        self._actors: list[_Hired] = []
        self._generation = 0
        self._share = 0.0  # of a GPU, that each actor has
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor.handle)
            if self._started:
                ray.shutdown()

    def _start(self) -> int:
        """Connect, and say how many workers to use."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if not ray.is_initialized():
            began = time.perf_counter()
            if self._address is None:
                self._count = self._count or _processors()
                ray.init(
                    address="local",
                    num_cpus=self._count,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
            else:
                try:
                    ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
                except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as reason:
                    raise UserError(
                        f"--ray.address {self._address}: cannot be joined ({one_line(reason)}); start a head there "
                        "with this Python and Ray, or leave it out to start Ray here"
                    ) from None
            self._started = True
            self.start_seconds = time.perf_counter() - began
        if self._count is None:  # once, before our own actors take what is free
            self._count = max(1, int(ray.available_resources().get("CPU", 1)))
        return self._count

    def map(self, setup: Callable[[], Callable[[Any], Any]], items: Sequence[Any]) -> Iterator[Any]:
        """`setup()` once in each worker, then its function over the items; results as they come.

        A `setup` with a true attribute `gpu` gets workers that have a share of a GPU each.

        Raises:
            UserError, OSError: as raised by `setup` or the function in a worker.
            UserError: an item kills its worker each time; there is no GPU; all workers are lost, or none can be made.
        """
        if not items:
            return
        actors = self._actors_for(len(items), getattr(setup, "gpu", False))
        import ray

        self._generation += 1
        shared = ray.put(setup)
        waiting = deque(range(len(items)))
        flying: dict[Any, tuple[int, int, Any]] = {}  # which item it is, which actor has it, and its handle then
        held = [0] * len(actors)
        lost: Counter[int] = Counter()  # by item, workers that died with it
        deadly: set[int] = set()  # items that lost all their workers, or lay behind one that did

        def send(number: int) -> None:
            while waiting and held[number] < (2 if len(waiting) > len(actors) and not deadly else 1):
                place, handle = waiting.popleft(), actors[number].handle
                flying[handle.call.remote(self._generation, shared, items[place])] = place, number, handle
                held[number] += 1

        def send_all() -> None:
            for number, actor in enumerate(actors):
                if actor.start is None:
                    send(number)

        starting = {actor.start: number for number, actor in enumerate(actors) if actor.start is not None}
        began, told, unborn, alone = time.monotonic(), False, 0, 0.0
        send_all()
        while flying or waiting:
            done, _ = ray.wait([*flying, *starting], num_returns=1, timeout=SILENT_SECONDS if starting else None)
            if starting and not told and time.monotonic() - began >= SILENT_SECONDS:
                what, told = "CPUs and GPUs" if self._share else "CPUs", True
                say(f"workers: {len(actors) - len(starting)} of {len(actors)} have started; the others wait for {what}")
            if not done:
                if alone and len(starting) == len(actors) and time.monotonic() - alone >= LOST_SECONDS:
                    raise UserError(LOST)
                continue
            if done[0] in starting:
                number = starting.pop(done[0])
                try:
                    ray.get(done[0])
                except ray.exceptions.RayError as failure:
                    unborn += 1
                    if unborn > RETRIES:
                        why = str(failure).strip().splitlines()[-1]  # of a traceback in colours
                        raise UserError(f"{UNBORN} ({one_line(why)})") from None
                    self._hire(actors[number])
                    starting[actors[number].start] = number
                    continue
                actors[number].start, unborn = None, 0
                send(number)
                continue
            place, number, handle = flying.pop(done[0])
            held[number] -= 1
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayTaskError as failure:
                if isinstance(failure.cause, UserError):
                    raise UserError(str(failure.cause)) from None
                if isinstance(failure.cause, OSError):  # Ray's own shape of it has no errno
                    raise failure.cause from failure
                raise
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.OutOfMemoryError,
                ray.exceptions.ObjectLostError,  # its answer went with its node
            ):
                if actors[number].handle is handle:  # not what lay behind an item that is known to be lost
                    self._hire(actors[number])
                    starting[actors[number].start] = number
                    began, told, alone = time.monotonic(), False, time.monotonic()
                lost[place] += 1
                if lost[place] > RETRIES:
                    if place in deadly:
                        raise UserError(_deadly(items[place])) from None
                    deadly.add(place)  # as often again, with no other item near it, so that the right one is named
                    del lost[place]
                waiting.appendleft(place)
                send_all()
                continue
            send(number)
            yield result

    def _actors_for(self, items: int, gpu: bool) -> "list[_Hired]":
        """As many actors as there is work for, first those that have started; those of earlier maps are used again,
        unless they have no such share."""
        count, share = self._start(), 0.0
        import ray

        if gpu:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            count, share = gpu_shares([(m.get("CPU", 0), m.get("GPU", 0)) for m in machines], count)
        if share != self._share:
            for actor in self._actors:
                ray.kill(actor.handle)  # which makes room
            self._actors, self._share = [], share
        while len(self._actors) < min(count, items):
            self._actors.append(self._hire(_Hired()))
        self._actors.sort(key=lambda actor: actor.start is not None)
        return self._actors[: min(count, items)]

    def _hire(self, actor: "_Hired") -> "_Hired":
        """Ask for a new actor, here in place of one that is lost."""
        import ray

        if actor.handle is not None:
            ray.kill(actor.handle)  # it may only have been out of reach, and would keep its CPU
        # One that is lost stays so: Ray would start it again where there may be no CPU for it, with its items.
        kind: Any = ray.remote(num_cpus=1, num_gpus=self._share, max_restarts=0, max_task_retries=0)(_Actor)
        actor.handle = kind.remote(os.getcwd())
        actor.start = actor.handle.start.remote()
        return actor


@dataclass(slots=True)
class _Hired:
    """An actor, and what `start` will have returned when it runs; None from then on."""

    handle: Any = None
    start: Any = None


def gpu_shares(machines: Sequence[tuple[float, float]], count: int) -> tuple[int, float]:
    """How many of `count` workers find a GPU, at most SHARERS on one and each with a CPU beside it, and what share of
    it they take. GPUs are filled one after another, so a share is no smaller than it must be.

    Args:
        machines: (CPUs, GPUs) of each.

    Raises:
        UserError: there is no GPU.
    """
    able = [(int(cpus), int(gpus)) for cpus, gpus in machines if int(cpus) and int(gpus)]
    if not able:
        raise UserError("device: cuda, but no machine of this Ray has a GPU; start it where one is, or set device: cpu")
    wanted = min(count, sum(cpus for cpus, _ in able))
    each = min(SHARERS, math.ceil(wanted / sum(gpus for _, gpus in able)))
    fitting = min(wanted, sum(min(cpus, gpus * each) for cpus, gpus in able))
    return fitting, math.floor(1e4 / each) / 1e4  # Ray counts in ten-thousandths


LOST = (
    "workers: all are lost, and the cluster had no CPU for another for so long that this gives up; see `ray status`, "
    "start nodes, and run the same command again, which goes on where this one stopped"
)
UNBORN = "workers: none can be started; does every node have this gemsmith under the same path?"


def _deadly(item: Any) -> str:
    return (
        f"a worker dies each time at {str(item)[:300]}: for its memory, or by a crash of what decodes or of a model; "
        "give workers more memory (fewer --workers), or take that out of the pool (measured alone into another --out "
        "with --unit_samples 1, the sample itself is named)"
    )


def _processors() -> int:
    """Those that this process may use, which in a container or a batch job are fewer than the machine's."""
    return len(os.sched_getaffinity(0))


class _Actor:
    """Sets up at the first call of a map: a restarted actor does too, and a user's error is that call's."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths of a recipe mean the driver's folder, where the host shares it
        self._generation = 0
        self._function: Callable[[Any], Any] | None = None

    def start(self) -> None:
        """Return when the actor has a process, and the CPU for it."""

    def call(self, generation: int, setup: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
        if self._function is None or generation != self._generation:
            self._function, self._generation = setup(), generation
        return self._function(item)


class _Log:
    """What was said last, and when: one a process, since there is one log."""

    doing = ""
    said = time.monotonic()

    def say(self, text: str) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
        self.said = time.monotonic()


_log = _Log()
say = _log.say


@contextmanager
def alive(label: str) -> Iterator[None]:
    """While the body runs, say every SILENT_SECONDS that it does, where nothing else is said: a model that trains in
    one worker, or a list that is read, gives no results to count."""
    began, end = time.monotonic(), threading.Event()
    _log.doing, _log.said = label, began

    def watch() -> None:
        while not end.wait(min(1.0, SILENT_SECONDS)):
            if time.monotonic() - _log.said >= SILENT_SECONDS:
                _log.say(f"{_log.doing}: still at work, {time.monotonic() - began:,.0f} s after the start")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def progress(
    results: Iterable[Any], *, label: str, total: int, unit: str, amount: Callable[[Any], int], brief: bool = False
) -> Iterator[Any]:
    """Pass the results on while showing how far they are: a bar on a terminal, plain lines in a log.

    `brief`: one of many that may be short, whose bar goes with it and whose end is no news.
    """
    _log.doing = label
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=not brief) as bar:
            for result in results:
                bar.update(amount(result))
                _log.said = time.monotonic()
                yield result
        return
    began = reported = time.monotonic()
    done = 0
    for result in results:
        done += amount(result)
        now = time.monotonic()
        since = _log.said if brief else reported
        if now - since >= REPORT_SECONDS or (done == total and not brief):
            rate = done / max(now - began, 1e-9)
            _log.say(f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f}/s")
            reported = now
        yield result
