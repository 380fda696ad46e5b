"""Start the `deepspeed` launcher and bring its ranks to a clean end.

The launcher passes SIGTERM on late or not at all (its runner dies and leaves
the ranks as orphans), and it returns 0 where its own child was killed. So the
ranks are signalled directly, by the ids they leave in RUN/ranks, ranks whose
runner is gone are waited for, and whether a run is complete is read from its
manifest. All of a launch is one session, which no other process can join: that
tells what is still ours of ids that may be somebody else's by now.

Left to itself the launcher also takes a cluster's list of hosts where it finds
one, and the first GPUs of the host whichever are to be seen: it is told to keep
to this host, and ranks which GPUs (training/__init__.py).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from curation.manifest import read_manifest
from training.config import ROOT

SCRIPT = str(ROOT / "training" / "train.py")
PATIENCE = 300.0
"""Seconds in which ranks without a runner have to finish their step and save; then they are killed."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(arguments: list[str], run: Path, ranks: int) -> int:
    """Run `deepspeed --num_accelerators RANKS training/train.py ARGUMENTS` to its end.

    Returns:
        0 where the run's manifest says it is complete; 143 after SIGTERM, SIGINT or the terminal's end (unless they
        are ignored, as under nohup), with a checkpoint saved; else the launcher's exit code (128 + the signal that
        killed it), or 1. No rank is left behind.
    """
    environment = {**os.environ, **shown_gpus()}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    stopped = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True

    told: set[int] = set()
    with held_port() as port:
        words = command(arguments, ranks, port)
        shutil.rmtree(run / "ranks", ignore_errors=True)  # ids of a killed run are somebody else's by now
        # Before there is anything to stop: a signal that came between would leave the ranks to themselves.
        heeded = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, ask_to_stop) for number in heeded}
        try:
            # A session of its own: a terminal's Ctrl-C reaches the ranks through us, once.
            process = subprocess.Popen(words, env=environment, start_new_session=True)
            while (code := process.poll()) is None:
                if stopped:
                    _tell(_rank_ids(run) & _living(process.pid), told)
                time.sleep(0.2)
            _end_orphans(process.pid, run, told)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if read_manifest(run / "manifest.json") is not None:
        return 0
    if stopped:
        return 143
    return 128 - code if code < 0 else code or 1


def shown_gpus() -> dict[str, str]:
    """What tells ranks which GPUs this process is shown: told how many ranks, the launcher forgets it."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"GEMSMITH_GPUS": shown} if shown else {}


def command(arguments: list[str], ranks: int, port: int) -> list[str]:
    """The words that start so many ranks on this host alone, which may be one of a cluster and have its list of hosts
    where the launcher looks for one by itself."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    where = ["--hostfile", os.devnull, "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [deepspeed, *where, SCRIPT, *arguments]


def _tell(ranks: set[int], told: set[int]) -> None:
    """SIGTERM to each once; ranks that are still starting are told as soon as they leave their id."""
    for rank in ranks - told:
        told.add(rank)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)


def _end_orphans(session: int, run: Path, told: set[int]) -> None:
    """Wait for the ranks that a runner has left behind, killed as it was: they save together, or are killed too."""
    deadline = time.monotonic() + PATIENCE
    if _living(session):
        print("the launcher is gone; its ranks save and end", file=sys.stderr, flush=True)
    while left := _living(session):
        _tell(_rank_ids(run) & left, told)
        for process in left if time.monotonic() > deadline else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.2)


def _living(session: int) -> set[int]:
    """Ids of a session's processes that train or launch what does; zombies are not."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(pid) == session and SCRIPT in psutil.Process(pid).cmdline():
                found.add(pid)
    return found


def _rank_ids(run: Path) -> set[int]:
    ids = set()
    for file in (run / "ranks").glob("*.pid"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # gone, or half written
            ids.add(int(file.read_text()))
    return ids


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port for this run's rendezvous that nobody else is given while it is held.

    It is bound here and not listened on. The kernel then gives it to no one who asks for any port, and refuses it to
    whoever asks for it by number, but to those who, as rank 0's store does, say that they share (SO_REUSEADDR).
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
