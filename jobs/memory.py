"""The largest proportional memory (PSS) of this process and all below it, sampled while they work.

PSS counts a page shared by n processes 1/n times in each, so the sum over
processes is what they really take together: Ray workers and training ranks
share most of torch. The kernel walks every page table for it, at the cost of whoever is
measured, so it is not done often.
"""

import threading
from typing import Any

import psutil


class PeakMemory:
    """A context: `peak_mib` is the largest sum seen."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.peak_mib = 0.0
        self._every, self._stop = every_seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._every):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended between the listing and the look
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
