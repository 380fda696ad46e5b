"""Build shards in slices, side by side as batch jobs do, and merge them.

    python -m jobs.shard_batch --slices 4 --parallel 2 -- --config R --pool POOL --out OUT

Every slice is a `gemsmith curate` process of its own with its own Ray, as on
nodes that know nothing of each other: first the slices of measure, then select,
which sees the whole pool, then the slices of build, and last the plain command,
which finds all work done and closes the output. The bytes are those of one
plain `gemsmith curate`. A slice that fails is tried once more, for a lost node;
a user's error would only come again. After a kill, the same command resumes.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from curation.errors import UserError, exit_code

OURS = ("--phase", "--part", "--overwrite")  # of which slices would undo each other's work


class Batch:
    """`gemsmith curate` with the same arguments, step by step; at most `parallel` processes at once."""

    def __init__(self, arguments: Sequence[str], slices: int, parallel: int) -> None:
        self._arguments = [*arguments]
        self._slices = slices
        self._parallel = parallel
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> None:
        """All steps in their order.

        Raises:
            UserError: a step failed, twice unless the user can mend it.
        """
        for phase in ("measure", "build"):
            if phase == "build":
                self._step("select", ["--phase", "select"], self._workers(1))
            with ThreadPoolExecutor(self._parallel) as threads:
                slices = [f"{i}/{self._slices}" for i in range(1, self._slices + 1)]
                futures = [threads.submit(self._slice, phase, part) for part in slices]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    self.stop()
                    raise
        self._step("merge", [], self._workers(1))

    def _slice(self, phase: str, part: str) -> None:
        self._step(f"{phase} {part}", ["--phase", phase, "--part", part], self._workers(self._parallel))

    def _workers(self, beside: int) -> list[str]:
        """This machine's cores, shared out over the processes side by side; what the user says comes first."""
        named = {word.partition("=")[0] for word in self._arguments}
        if named & {"--workers", "--ray.address"}:
            return []
        return ["--workers", str(max(1, (os.cpu_count() or 1) // beside))]

    def _step(self, label: str, words: list[str], workers: list[str]) -> None:
        executable = str(Path(sys.executable).with_name("gemsmith"))
        command = [executable, "curate", *self._arguments, *words, *workers]
        code, error = self._process(label, command)
        if code not in (0, 2) and not self._stopped:
            print(f"[{label}] exited with {code}; once more", file=sys.stderr, flush=True)
            code, error = self._process(label, command)
        if code:
            raise UserError(f"{label}: {error or f'`gemsmith curate` exited with {code}'}")

    def _process(self, label: str, command: list[str]) -> tuple[int, str]:
        """One process to its end, its output line by line behind its label: (exit code, its `error:` line)."""
        with self._lock:
            if self._stopped:
                return 1, "stopped"
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self._running.add(process)
        error = ""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                print(f"[{label}] {line}", end="", flush=True)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code, error

    def stop(self) -> None:
        """End the processes that run and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m jobs.shard_batch", allow_abbrev=False)
    parser.add_argument("--slices", type=int, required=True, help="slices of the pool's shards")
    parser.add_argument("--parallel", type=int, default=1, help="slices that run at once")
    a = parser.parse_args(words[:at])
    curate = words[at + 1 :]
    if not curate:
        raise UserError("jobs.shard_batch: nothing to curate; end with `-- --config R --pool POOL --out OUT`")
    for name, value in (("slices", a.slices), ("parallel", a.parallel)):
        if value < 1:
            raise UserError(f"--{name} {value}: at least 1")
    for word in curate:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word}: not after `--`, the batch decides it; leave it out")
    batch = Batch(curate, a.slices, a.parallel)

    def interrupted(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    try:
        batch.run()
    finally:
        batch.stop()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
