"""`gemsmith watch`: grades the checkpoints of a run as they land, beside the training.

A checkpoint exists once its manifest.json does, because the trainer writes
that last; until then the folder is not looked into. Training may delete old
checkpoints (`keep_last`) at any moment, also between listing and loading: a
checkpoint whose manifest has gone is reported and passed over. A file system
that hosts share may show this one the manifest before the files that it names:
such a checkpoint is looked at again for a minute. The watch ends
when the run's own manifest is there and every complete checkpoint was graded.
What was graded before is found in the results file, so a watch can be killed
and started again at any time.

With `best` it also names the best checkpoint so far in RUN/best.json, and
training never drops that one.
"""

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from curation.errors import UserError, full_disk_named
from curation.manifest import read_manifest, write_manifest
from evaluation import results
from evaluation.compare import LOWER_IS_BETTER
from evaluation.evaluate import EvaluateConfig, Load, Sources, grade, limit_threads, load_checkpoint, open_sources


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; signals reach the main thread only, so elsewhere it stays unset."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(
    *,
    run: Path,
    tasks: list[str],
    data: Sources,
    out: Path,
    cache: Path | None = None,
    config: EvaluateConfig | None = None,
    poll_seconds: float = 2.0,
    idle_seconds: float | None = None,
    threads: int | None = None,
    best: str | None = None,
    load: Load = load_checkpoint,
) -> int:
    """Grade every checkpoint of `run`, from its first to its last.

    Says so once where there is no such run or no checkpoint yet. Ends when the
    run is finished, when `idle_seconds` pass without a new checkpoint (a run that
    died leaves no manifest), or on SIGTERM after the task in hand. `threads` limits
    torch, so that the training beside it keeps its cores. Every checkpoint is graded
    on all of the data: give tasks that write a limit in `config` where the training
    should not outrun them. `best`: TASK.METRIC, of which more is better, that
    RUN/best.json follows.

    Returns:
        How many checkpoints were graded completely (those found in `out` count too).

    Raises:
        UserError: unknown tasks, unusable data, or an `out` or `cache` that cannot be
            written to. A checkpoint that cannot be graded (NaN, collapsed, cut short)
            is reported and passed over.
    """
    sources = open_sources(tasks, data)
    if best is not None and best.partition(".")[0] not in tasks:
        raise UserError(f"--best {best}: begins with no task of this watch; take TASK.METRIC, with one of {tasks}")
    if best is not None and best.endswith(LOWER_IS_BETTER):
        raise UserError(f"--best {best}: less of it is better; take a metric of which more is, such as a recall")
    results.check_writable(out, cache)
    config = config or EvaluateConfig()
    seen: set[tuple[Path, int]] = set()
    coming: dict[tuple[Path, int], float] = {}  # those of which not all files are seen, and since when
    met, graded = 0, 0
    with _stop_on_sigterm() as stop, full_disk_named(*filter(None, (out, cache))):
        from training import checkpoint as checkpoints  # and torch, whose seconds of importing are no idle ones

        limit_threads(threads)
        last_news, told = time.monotonic(), False

        while not stop.is_set():
            finished = (run / "manifest.json").exists()  # before listing: a checkpoint may land in between
            landed, waits = _landed(checkpoints.complete(run)), False
            if not (landed or finished or told):
                what = "no checkpoint yet" if run.is_dir() else "no such folder yet"
                print(f"{run}: {what}, waiting for the first", flush=True)
                told = True
            for checkpoint, written in landed:
                if (checkpoint, written) in seen or stop.is_set():
                    continue
                if checkpoints.is_coming(checkpoint):
                    since = coming.setdefault((checkpoint, written), time.monotonic())
                    if time.monotonic() - since < checkpoints.APPEARS_S:
                        waits = True
                        continue
                seen.add((checkpoint, written))
                met += 1
                try:
                    rows = _grade_all(checkpoint, sources, out, cache, config, load, stop)
                except Exception as error:
                    stop.wait(poll_seconds)  # a removal that is under way gets the time to end
                    if (checkpoint, written) not in _landed(checkpoints.complete(run)):
                        print(f"{checkpoint}: removed before it was graded", flush=True)
                    elif isinstance(error, UserError):
                        print(f"{checkpoint}: not graded: {error}", flush=True)
                    else:
                        raise
                else:
                    graded += rows is not None
                    # One that training dropped meanwhile is no best to keep.
                    if best is not None and rows is not None and (checkpoint / "manifest.json").exists():
                        note_best(run, checkpoint, best, rows)
                last_news = time.monotonic()
            if finished and not waits and not stop.is_set():
                print(f"{run}: finished, {graded} of {met} checkpoints graded into {out}", flush=True)
                return graded
            if idle_seconds is not None and time.monotonic() - last_news > idle_seconds:
                print(f"{run}: no checkpoint for {idle_seconds:g} s and no manifest.json, gave up waiting", flush=True)
                return graded
            stop.wait(poll_seconds)
    print(f"{run}: stopped, {graded} checkpoints graded into {out}", flush=True)
    return graded


def _landed(complete: Iterable[Path]) -> list[tuple[Path, int]]:
    """Complete checkpoints and when they were (ns): a run that is begun anew has other ones of the same names."""
    landed = []
    for checkpoint in complete:
        with suppress(FileNotFoundError):  # dropped since it was listed
            landed.append((checkpoint, (checkpoint / "manifest.json").stat().st_mtime_ns))
    return landed


def _grade_all(
    checkpoint: Path,
    sources: dict[str, object],
    out: Path,
    cache: Path | None,
    config: EvaluateConfig,
    load: Load,
    stop: threading.Event,
) -> list[dict[str, Any]] | None:
    """The rows of all tasks of one checkpoint; None where a stop came in between."""
    model, rows = load(checkpoint), []
    for task, source in sources.items():
        if stop.is_set():
            return None
        rows += grade(model, checkpoint, task, source, out=out, cache=cache, config=config)
    return rows


def note_best(run: Path, checkpoint: Path, best: str, rows: list[dict[str, Any]]) -> None:
    """Name this checkpoint in RUN/best.json where its TASK.METRIC is above the one there.

    Raises:
        UserError: the tasks gave no such metric.
    """
    task, _, metric = best.partition(".")
    values = {row["metric"]: row["value"] for row in rows if row["task"] == task}
    if metric not in values:
        raise UserError(f"--best {best}: {task} gives no such metric; take one of {', '.join(sorted(values))}")
    before = read_manifest(run / "best.json")
    if before is not None and not (checkpoint.parent / before["checkpoint"] / "manifest.json").exists():
        before = None
    if before is None or before["metric"] != best or values[metric] > before["value"]:
        write_manifest(run / "best.json", {"checkpoint": checkpoint.name, "metric": best, "value": values[metric]})
