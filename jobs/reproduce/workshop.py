"""Where a claim is worked on: its folder, its share of the full sizes, and the commands it runs.

Every step is a command of the project as a process of its own, whose output
goes to a log beside what it made. Steps run side by side, a core each. All of
them hold the claim's lock: while a step that a killed `reproduce` left behind
is still at work, another `reproduce` of that claim is refused.
"""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.errors import UserError
from evaluation import results
from jobs.reproduce.claim import Score
from jobs.steps import precision, tool
from training.config import ROOT

HELDOUT = 1_000_003
"""Seed of what arms are graded on, the same for every seed of a claim. (Clean sets of one seed are the same scenes.)"""


@dataclass(slots=True)
class Workshop:
    """A claim's place of work. scale: share of the registered sizes · lock: its descriptor."""

    name: str
    sizes: Mapping[str, int]
    folder: Path
    scale: float
    lock: int
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @property
    def shared(self) -> Path:
        """What all seeds of the claim share."""
        return self.folder / "shared"

    def size(self, what: str, least: int) -> int:
        """A registered size at this scale, `least` at least: below that there is nothing to train or grade on."""
        return max(round(self.sizes[what] * self.scale), least)

    def run(self, log: Path, *command: object, threads: int = 1) -> None:
        """Run a command of so many threads a process to its end.

        Raises:
            UserError: it failed; names the log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "ab") as f:
            with self._guard:
                if self._closed:
                    raise UserError(f"reproduce {self.name}: stopped")
                process = subprocess.Popen(
                    [*map(str, command)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                    start_new_session=True, pass_fds=(self.lock,),
                )  # fmt: skip
                self._running.add(process)
            code = process.wait()
        with self._guard:
            self._running.discard(process)
        if code:
            lines = log.read_text(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line.startswith("error: ")), f"ended with {code}")
            raise UserError(f"reproduce {self.name}: {' '.join(map(str, command[1:3]))} {said}; {log} has the rest")

    def gemsmith(self, log: Path, *arguments: object) -> None:
        self.run(log, tool("gemsmith"), *arguments)

    def synth(self, out: Path, pairs: int, seed: int, *options: object) -> None:
        """A clean set, unless the options say another."""
        options = options or ("--clean",)
        self.gemsmith(
            out.with_name(f"{out.name}.log"), "synth", "--out", out, "--pairs", pairs, "--seed", seed, "--workers", 1,
            *options,
        )  # fmt: skip

    def step(self, name: str, log: Path, *words: object) -> None:
        """One of `jobs.reproduce.step`."""
        self.run(log, sys.executable, "-m", "jobs.reproduce.step", name, *words)

    def tokenizer(self, out: Path, *words: object) -> None:
        """What a run with these words of `gemsmith train` would train its tokenizer as; for arms that share one."""
        self.step("make_tokenizer", out.with_name(f"{out.name}.log"), out, *words)

    def stop(self) -> None:
        """End every step that runs, and start none any more; trainings save a checkpoint first."""
        with self._guard:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


@dataclass(frozen=True, slots=True)
class Seed:
    """One repetition: its own data, order and initial weights, which all arms share."""

    workshop: Workshop
    number: int

    @property
    def folder(self) -> Path:
        return self.workshop.folder / f"seed_{self.number}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def arm(self, name: str) -> Path:
        return self.folder / "arms" / name

    def evaluate(self, arm: str, run: Path, task: str, data: Path, *settings: object) -> dict[str, dict[str, Any]]:
        """Rows of `gemsmith evaluate`, by metric."""
        folder = self.arm(arm)
        out = folder / "results.jsonl"
        self.workshop.gemsmith(
            folder / "log", "evaluate", "--checkpoint", run / "export", "--tasks", task, "--data", data, "--out", out,
            "--threads", 1, *settings,
        )  # fmt: skip
        return {row["metric"]: row for row in results.read(out) if row["task"] == task}

    def grade(self, grader: str, arm: str, run: Path, *data: Path) -> dict[str, Score]:
        """Scores by a grading step."""
        out = self.arm(arm) / f"{grader}.json"
        self.workshop.step(grader, self.arm(arm) / "log", run / "export", *data, out)
        return {name: Score(*found) for name, found in json.loads(out.read_text()).items()}


def training(recipe: str, out: Path, *, seed: int, samples: int, ranks: int = 1) -> list[str]:
    """The words of `gemsmith` that all trainings share. One rank needs no partition: ZeRO-1 runs the fastest there."""
    words = ["train", "--config", recipe, "--out", out, "--ranks", ranks, "--seed", seed, "--samples", samples]
    words += ["--precision", precision(), "--deepspeed", "ds_configs/zero1.json"]
    return [*map(str, words), "--checkpoint_every", "100", "--log_every", "5"]


def score(row: dict[str, Any]) -> Score:
    """A row of a results file."""
    return Score(row["value"], row["chance"] or 0.0)


@contextmanager
def locked(file: Path, name: str) -> Iterator[int]:
    """The descriptor of a lock that this process and all steps it starts hold.

    Raises:
        UserError: someone else holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"reproduce {name}: {file.parent} is being worked on, by another run or by a step that a killed one "
                "left behind; wait for it to end"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
