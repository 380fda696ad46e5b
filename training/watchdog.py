"""Ends a run in which no step ends any more, and says which rank hangs, and where.

A thread of every rank looks at when its last step ended. Past `hang_seconds`
it writes the stacks of all its threads to the rank's log and publishes, as a
file in RUN/ranks (never by a collective: those are what hangs), where its main
thread stands and how many collectives it has begun. Rank 0 reads the files of
all ranks and prints one line. The ranks that others wait for are those that
have begun the fewest collectives; a rank without a file is dead or cannot run
Python. Then every rank exits.

A main thread that holds the interpreter's lock stops this thread too: then
faulthandler, which needs no lock, writes the stacks some time later and ends the process.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from curation.manifest import write_json
from training.config import ROOT
from training.traffic import TRAFFIC

EXIT_CODE = 75
"""EX_TEMPFAIL: the run can be resumed from its last checkpoint."""

PASSED_ON = ("distributed.py", "traffic.py", "flops.py")
"""Files of ours whose lines only pass on what others ask for."""


class Watchdog:
    """Watches this process from `start` to `stop`; `beat` when a step has ended.

    Args:
        folder: RUN/ranks, which every rank sees.
        log: this rank's log, a real file.
        say: prints rank 0's line.
        grace: seconds that ranks wait for each other's files, once they hang.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        seconds: float,
        log: TextIO,
        say: Callable[[str], None],
        grace: float = 20.0,
    ) -> None:
        self.folder, self.rank, self.size, self.seconds, self.log, self.say = folder, rank, size, seconds, log, say
        self.grace = grace
        self.step, self.phase = 0, "starting"
        self._beaten, self._stopped = time.monotonic(), threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(self.rank).unlink(missing_ok=True)
        (self.folder / "hang.json").unlink(missing_ok=True)
        self.beat(step, "starting")
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """`step` steps have ended, and `phase` begins."""
        self.step, self.phase, self._beaten = step, phase, time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + 4 * self.grace, exit=True, file=self.log)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _file(self, rank: int) -> Path:
        return self.folder / f"hang_{rank:05d}.json"

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() - self._beaten > self.seconds:
                self._end()

    def _end(self) -> None:
        try:
            print(
                f"no step has ended for {self.seconds:g} s; step {self.step}, {self.phase}", file=self.log, flush=True
            )
            faulthandler.dump_traceback(file=self.log, all_threads=True)
            here = {"rank": self.rank, "step": self.step, "phase": self.phase, **_position(self._main)}
            write_json(self._file(self.rank), here)
            deadline = time.monotonic() + self.grace
            while time.monotonic() < deadline and not all(self._file(r).exists() for r in range(self.size)):
                time.sleep(0.1)
            if self.rank == 0:
                found = {r: json.loads(self._file(r).read_text()) for r in range(self.size) if self._file(r).exists()}
                line = verdict(found, self.size, self.seconds)
                print(line, file=self.log, flush=True)
                self.say(line)
                write_json(self.folder / "hang.json", {"line": line})
            # The launcher kills the others when one has gone, so the one that speaks goes first.
            deadline = time.monotonic() + self.grace
            while time.monotonic() < deadline and not (self.folder / "hang.json").exists():
                time.sleep(0.1)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)


def _position(thread: int | None) -> dict[str, Any]:
    """Where a thread stands: its innermost line, the innermost one that asks for something rather than passes it on,
    and the collectives it has begun."""
    stack = _stack_of(thread)
    ours = [f for f in stack if _is_ours(Path(f.filename))]
    return {
        "at": _line(stack[-1]),
        "ours": _line(ours[-1]) if ours else None,
        "collectives": TRAFFIC.entered,
        "last": TRAFFIC.last,
        "waits": any(f.filename.endswith("distributed_c10d.py") or _waits(f) for f in stack),
    }


def _stack_of(thread: int | None) -> traceback.StackSummary:
    """A thread's, outermost first. Of a GPU's backward pass torch runs the hooks, DeepSpeed's too, in a thread of its
    own, which no Python began, while the one that asked for it stands still: its lines then go on from those."""
    frames = sys._current_frames()
    stack = traceback.extract_stack(frames.pop(thread))  # type: ignore[arg-type]
    if stack[-1].name == "_engine_run_backward":
        frames.pop(threading.main_thread().ident, None)  # type: ignore[arg-type]
        for hooks in map(traceback.extract_stack, frames.values()):
            if hooks[0].name != "_bootstrap":
                return traceback.StackSummary.from_list([*stack, *hooks])
    return stack


def _waits(frame: traceback.FrameSummary) -> bool:
    """In the wait for a collective that was begun before: ours for a ring's blocks or for what NCCL has yet to reduce,
    DeepSpeed's for weights."""
    ours = frame.filename.endswith("training/distributed.py") and frame.name in ("wait", "_reduce")
    return ours or (frame.name == "wait" and "/deepspeed/" in frame.filename)


def _is_ours(file: Path) -> bool:
    return file.is_relative_to(ROOT) and "site-packages" not in file.parts and file.name not in PASSED_ON


def _line(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown}:{frame.lineno} in {frame.name}"


def verdict(ranks: Mapping[int, Mapping[str, Any]], size: int, seconds: float) -> str:
    """One line: which ranks hang where, and where the others wait for them. `ranks`: what each has published."""
    head = f"hang: no step has ended for {seconds:g} s"
    silent = [r for r in range(size) if r not in ranks]
    if silent:
        waiting = "; ".join(_waiting(ranks[r]) for r in sorted(ranks)[:1])
        names = _names(silent)
        return f"{head}; {names} left no word: dead, or held outside Python (see its log and the kernel's); {waiting}"
    fewest = min(p["collectives"] for p in ranks.values())
    behind = [r for r, p in sorted(ranks.items()) if p["collectives"] == fewest]
    if len(behind) == size:  # all have begun as many: who is not inside the last one has not finished what follows it
        behind = [r for r in behind if not ranks[r]["waits"]]
    if not behind:
        return f"{head}; all ranks wait in collective {fewest} ({ranks[0]['last']}): the network or a device is stuck"
    if len(behind) == size:
        return f"{head}; all ranks have begun {fewest} collectives and none is inside one: {_everywhere(ranks)}"
    others = next(r for r in sorted(ranks) if r not in behind)
    more = f" ({'as does' if len(behind) == 2 else 'as do'} {_names(behind[1:])})" if len(behind) > 1 else ""
    return f"{head}; rank {behind[0]} hangs at {_standing(ranks[behind[0]])}{more}; {_waiting(ranks[others])}"


def _everywhere(ranks: Mapping[int, Mapping[str, Any]]) -> str:
    """Where each rank stands, the line that fewest stand at first: who differs keeps the others waiting. (NCCL's calls
    return at once, and what waits is whatever asks for a number of theirs next: an `.item()`, a copy.)"""
    places: dict[str, list[int]] = {}
    for r, p in sorted(ranks.items()):
        places.setdefault(_standing(p), []).append(r)
    return "; ".join(f"{_names(found)} at {place}" for place, found in sorted(places.items(), key=lambda x: len(x[1])))


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _standing(p: Mapping[str, Any]) -> str:
    """Its line, and the one of ours that has called it."""
    called = f", called at {p['ours']}" if p["ours"] and p["ours"] != p["at"] else ""
    return f"{p['at']}{called} (after step {p['step']}, {p['phase']})"


def _waiting(p: Mapping[str, Any]) -> str:
    return f"rank {p['rank']} waits at {p['ours'] or p['at']}, collective {p['collectives']} ({p['last']})"
