"""What a run says of itself: metrics.jsonl, TensorBoard, W&B where asked for and a line for people, from rank 0;
and a log of each rank in RUN/logs, with what its libraries and warnings say."""

import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from curation.errors import UserError
from curation.manifest import SCHEMA_VERSION

LIBRARIES = ("", "DeepSpeed", "transformers")
"""Loggers that do not pass on to the root, and the root."""
SHOWN = ("loss", "temperature", "grad_norm", "samples_per_second")
"""Figures of the line that a log shows, those that the step has."""


def check_wandb(project: str | None) -> None:
    """
    Raises:
        UserError: W&B is asked for and not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb: {project} needs the wandb package; `pip install gemsmith[wandb]`, or leave log.wandb out"
        )


class RunLog:
    """One writer per run; on a resumed run the lines past the checkpoint are dropped first."""

    def __init__(
        self,
        run: Path,
        start_step: int,
        total_steps: int,
        *,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in _whole_lines(self.path) if line["step"] <= start_step]
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self.path)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.wandb: Any = _wandb_run(wandb, run, config) if wandb else None
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step") if terminal else None
        self.total_steps, self.started, self.start_step = total_steps, time.monotonic(), start_step

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; nested figures (`errors: {reason: n}`) are `name/key` on the boards, which have no words."""
        self.file.write(json.dumps({"schema_version": SCHEMA_VERSION, "step": step, **metrics}) + "\n")
        flat = dict(_flat(metrics))
        for name, value in flat.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(flat, step=step, commit=True)
        shown = " ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN if k in metrics)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(shown)
        else:
            spent = time.monotonic() - self.started
            left = spent / max(1, step - self.start_step) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps} {shown} left {left:.0f} s", flush=True)

    def say(self, line: str) -> None:
        """A line beside the progress bar."""
        if self.bar is not None:
            self.bar.clear()
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.file.close()
        self.board.close()


def _flat(metrics: dict[str, Any]) -> Any:
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", x) for key, x in value.items())
        elif not isinstance(value, str):
            yield name, value


def _wandb_run(project: str, run: Path, config: dict[str, Any] | None) -> Any:
    """The run's page, the same one after a resume; WANDB_MODE=offline keeps it in RUN/wandb."""
    import wandb

    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=run.name, id=name, resume="allow", dir=str(run), config=config)


class Handler(logging.StreamHandler):
    """Says nothing where it cannot write: a full disk ends the run by what must be written, in one line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def open_rank_log(run: Path, rank: int) -> TextIO:
    """RUN/logs/rank_00000.log: logging and warnings of this rank from now on, and its stacks where it crashes."""
    path = run / "logs" / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "a", buffering=1)  # noqa: SIM115 (open to the end; a resumed run goes on below)
    handler = Handler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    logging.captureWarnings(True)
    faulthandler.enable(stream, all_threads=True)
    return stream


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that a kill or a full disk did not cut."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
