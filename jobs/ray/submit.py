"""Curate on a running Ray head as a Ray job, followed to its true end.

    python -m jobs.ray.submit --address http://127.0.0.1:8265 -- curate --config R --pool POOL --out OUT

What `ray job submit` does, through the same job server, but for one thing: that
command takes the end of its log stream for the end of the job, and a dropped
WebSocket ends the stream. Here the job's status is the truth and is polled until
it is final; the log is decoration, picked up again where it broke off.

The checkout, the pool and OUT are expected on a disk that the cluster shares, at
the same paths. Where the checkout is not shared, `--working-dir` sends it along
and the paths after `--` are the cluster's.
"""

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curation.errors import UserError, exit_code, one_line

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 300.0  # for a head that does not answer: it may be starting its dashboard again
STOP_SECONDS = 30.0
APPEARS_SECONDS = 60.0  # until a network's file system shows this host what another has written (NFS: `acdirmax`)
PATHS = ("--config", "--pool", "--out", "--signals")


class Log:
    """The job's output on our stdout; `shown` characters of it are out, so a new stream goes on from there.

    error: what its last line of a user's error says, once the job has ended.
    """

    def __init__(self) -> None:
        self.shown = 0
        self.error: str | None = None

    def show(self, text: str, at: int) -> None:
        """Print what is new in `text`, which begins at character `at` of the log."""
        new = text[max(0, self.shown - at) :]
        if new:
            print(new, end="", flush=True)
            self.shown = at + len(text)

    def end(self, text: str) -> None:
        """All of it, when the job has ended."""
        self.show(text, 0)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        self.error = errors[-1].removeprefix("error: ") if errors else None


async def follow(client: Any, job: str, log: Log) -> Any:
    """Show the job's log until its status is final, and return its `JobDetails`.

    Raises:
        UserError: the head does not answer for `PATIENCE_SECONDS`.
    """
    tail = asyncio.create_task(_tail(client, job, log))
    answered = time.monotonic()
    try:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                details = await asyncio.to_thread(client.get_job_info, job)
                if details.status.is_terminal():
                    log.end(await asyncio.to_thread(client.get_job_logs, job))
                    return details
                answered = time.monotonic()
            except (RuntimeError, OSError) as reason:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise UserError(
                        f"--address: the head has not answered for {PATIENCE_SECONDS:.0f} s ({one_line(reason)}); "
                        f"job {job} may go on: `ray job status {job}`"
                    ) from None
            if tail.done():
                tail = asyncio.create_task(_tail(client, job, log))
    finally:
        tail.cancel()


async def _tail(client: Any, job: str, log: Log) -> None:
    """One log stream to its end, whatever ends it. The server begins each one with the log's first line."""
    at = 0
    try:
        async for text in client.tail_job_logs(job):
            log.show(text, at)
            at += len(text)
    except (RuntimeError, OSError):
        return  # `follow` opens the next


async def _run(client: Any, job: str, log: Log) -> tuple[Any, int]:
    """(details, number of the signal that ended it, or 0). Ctrl-C and SIGTERM stop the job and await its end; what
    cannot be stopped is said, and has no details."""
    loop, task = asyncio.get_running_loop(), asyncio.create_task(follow(client, job, log))
    received = 0

    def stop(number: int) -> None:
        nonlocal received
        received = number
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task, 0
    except asyncio.CancelledError:
        print(f"stopping job {job}", file=sys.stderr, flush=True)
        try:
            await asyncio.to_thread(client.stop_job, job)
            return await asyncio.wait_for(follow(client, job, log), STOP_SECONDS), received
        except (RuntimeError, OSError) as reason:  # a TimeoutError is one, and says nothing
            why = one_line(reason) or f"it has not ended for {STOP_SECONDS:.0f} s"
            print(f"job {job} may go on ({why}): `ray job stop {job}`", file=sys.stderr, flush=True)
            return None, received


def submit(address: str, arguments: Sequence[str], working_dir: str | None = None) -> int:
    """Run `gemsmith curate ARGUMENTS` on the cluster at `address` to its end.

    Returns:
        0 where the job succeeded and its manifest is there; 128 + the signal's number after a signal;
        else the job's own exit code, or 1.

    Raises:
        UserError: no head at the address, or the job failed with a user's error.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        # A head that finds a token in its user's home asks for it; clients send one only where they are told to.
        raise UserError(
            f"--address {address}: the head asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where the "
            "head's token is not in ~/.ray/auth_token"
        ) from None
    except (ConnectionError, RuntimeError) as reason:
        raise UserError(f"--address {address}: no Ray job server answers ({one_line(reason)}); start a head") from None
    runtime_env = {"working_dir": working_dir} if working_dir else None
    try:
        job = client.submit_job(entrypoint=entrypoint(arguments, shared=not working_dir), runtime_env=runtime_env)
    except (RuntimeError, OSError) as reason:
        raise UserError(
            f"--address {address}: the head takes no job ({one_line(reason)}); look at its dashboard"
        ) from None
    print(f"job {job} at {address}", flush=True)
    log = Log()
    details, received = asyncio.run(_run(client, job, log))
    if received:
        return 128 + received
    if details.status != JobStatus.SUCCEEDED:
        if log.error is not None:
            raise UserError(log.error)
        print(f"job {job}: {details.status} ({one_line(details.message)})", file=sys.stderr)
        return details.driver_exit_code or 1
    manifest = None if working_dir else _manifest(arguments)
    if manifest is not None and not _appears(manifest):
        print(f"job {job}: succeeded, but {manifest} is not there; is OUT on a shared disk?", file=sys.stderr)
        return 1
    return 0


def _appears(file: Path) -> bool:
    """Whether a file that another host has written is seen here, soon."""
    until = time.monotonic() + APPEARS_SECONDS
    while not (seen := file.is_file()) and time.monotonic() < until:
        time.sleep(min(1.0, APPEARS_SECONDS / 10))
    return seen


def entrypoint(arguments: Sequence[str], *, shared: bool) -> str:
    """The shell command that the head runs. A shared checkout runs in this folder with this environment's gemsmith."""
    if not shared:
        return shlex.join(["gemsmith", "curate", *arguments, "--ray.address", "auto"])
    gemsmith = str(Path(sys.executable).with_name("gemsmith"))
    command = [gemsmith, "curate", *_absolute(arguments), "--ray.address", "auto"]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"


def _absolute(arguments: Sequence[str]) -> list[str]:
    """Paths as the cluster's workers need them, whose folder is where their Ray was started."""
    made: list[str] = []
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if i and arguments[i - 1] in PATHS:
            made.append(_anywhere(word))
        elif equals and option in PATHS:
            made.append(f"{option}={_anywhere(value)}")
        else:
            made.append(word)
    return made


def _anywhere(path: str) -> str:
    """A URL names the same thing from every folder."""
    return path if "://" in path else os.path.abspath(path)


def _manifest(arguments: Sequence[str]) -> Path | None:
    """The manifest that says this curation is complete; None for a slice or a dry run, which leave none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--phase", default="all")
    parser.add_argument("--part")
    parser.add_argument("--dry-run", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    if known.part or known.dry_run or known.out is None:
        return None
    return known.out / ("manifest.json" if known.phase == "all" else f"{known.phase}.manifest.json")


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m jobs.ray.submit", allow_abbrev=False)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the head's dashboard")
    parser.add_argument("--working-dir", help="folder or URI of the checkout, where the cluster does not share it")
    a = parser.parse_args(words[:at])
    command = words[at + 1 :]
    if command[:1] != ["curate"]:
        raise UserError("jobs.ray.submit: no command; end with `-- curate --config R --pool POOL --out OUT`")
    return submit(a.address, command[1:], a.working_dir)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
