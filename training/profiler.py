"""torch's profiler over a range of steps: a trace for chrome://tracing or Perfetto, and a table of slow operators."""

from pathlib import Path
from typing import Any


class Profiler:
    """Records steps `steps[0]` to `steps[1]`, both included and counted from 1, into `folder`; nothing for None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.running: Any = None

    def begin(self, step: int) -> None:
        """Step `step` is about to begin; a run resumed inside the range records the rest of it."""
        if self.steps is None or self.running is not None or not self.steps[0] <= step <= self.steps[1]:
            return
        from torch.profiler import profile

        self.running = profile(record_shapes=True, profile_memory=True)  # all activities that this machine has
        self.running.start()

    def end(self, step: int | None = None) -> None:
        """Step `step` has ended; without a number, the run has."""
        if self.steps is None or self.running is None or (step is not None and step < self.steps[1]):
            return
        profile, self.running = self.running, None
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self.steps[0]:08d}_{self.steps[1]:08d}"
        profile.export_chrome_trace(str(self.folder / f"{name}.json"))
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self.folder / f"{name}.txt").write_text(table)
