"""What a run says of itself: metrics.jsonl, TensorBoard and a line for people, from rank 0."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from curation.manifest import SCHEMA_VERSION


class RunLog:
    """One writer per run; on a resumed run the lines past the checkpoint are dropped first."""

    def __init__(self, run: Path, start_step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if line["step"] <= start_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step") if terminal else None
        self.total_steps, self.started, self.start_step = total_steps, time.monotonic(), start_step

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps({"schema_version": SCHEMA_VERSION, "step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        shown = " ".join(f"{k} {metrics[k]:.4g}" for k in ("loss", "temperature", "grad_norm", "samples_per_second"))
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(shown)
        else:
            spent = time.monotonic() - self.started
            left = spent / max(1, step - self.start_step) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps} {shown} left {left:.0f} s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.file.close()
        self.board.close()
