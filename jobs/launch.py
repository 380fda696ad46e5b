"""Start the `deepspeed` launcher and bring its ranks to a clean end.

The launcher passes SIGTERM on late or not at all (its runner dies and leaves
the ranks as orphans), and it returns 0 where its own child was killed. So the
ranks are signalled directly, by the ids they leave in RUN/ranks, and whether a
run is complete is read from its manifest.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from curation.manifest import read_manifest
from training.config import ROOT


def launch(arguments: list[str], run: Path, ranks: int) -> int:
    """Run `deepspeed --num_accelerators RANKS training/train.py ARGUMENTS` to its end.

    Returns:
        0 where the run's manifest says it is complete; 143 after SIGTERM or SIGINT, with a checkpoint saved;
        else the launcher's exit code, or 1.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "training" / "train.py"),
        *arguments,
    ]
    shutil.rmtree(run / "ranks", ignore_errors=True)  # ids of a killed run are somebody else's by now
    # A session of its own: a terminal's Ctrl-C reaches the ranks through us, once.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    stopped = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True

    told: set[int] = set()
    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (code := process.poll()) is None:
            # Ranks that are still starting are told as soon as they leave their id.
            for rank in _rank_ids(run) - told if stopped else ():
                told.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGTERM)
            time.sleep(0.2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if read_manifest(run / "manifest.json") is not None:
        return 0
    return 143 if stopped else code or 1


def _rank_ids(run: Path) -> set[int]:
    ids = set()
    for file in (run / "ranks").glob("*.pid"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # gone, or half written
            ids.add(int(file.read_text()))
    return ids


def free_port() -> int:
    """A port for this run's rendezvous, so that two runs on one host do not meet."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
