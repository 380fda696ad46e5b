"""Why the training waits for data, in one line that names the slow part and the mend.

Two figures decide: how long the step loop waited for a batch, and where the
loader's threads spent their time meanwhile (`Timers`: seconds by part, summed
over its threads). Waiting alone would not tell a slow disk from slow decoding.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

MENDS = {
    "read": "the disk or network is slow: copy the shards to a local disk, or lower loader.window_shards",
    "decode": "decoding, cropping and resizing are slow: raise loader.threads (now {threads}), or set "
    "loader.cache_decoded, or lower loader.decode_size, or store smaller pictures",
    "tokenise": "tokenisation is slow: lower loader.max_tokens, or use a fast tokenizer",
    "collate": "stacking and normalising pictures is slow: raise loader.threads (now {threads})",
}
"""What the parts of a loader are called, and what to do about each."""


class Timers:
    """Seconds that the threads of a loader spend in each of its parts."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what happens inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[part] += time.perf_counter() - begun

    @property
    def seconds(self) -> dict[str, float]:
        """So far, over all threads."""
        with self._lock:
            return dict(self._seconds)


def warning(waited: float, spent: float, seconds: Mapping[str, float], threads: int, bound: float) -> str | None:
    """The warning for a window of `spent` seconds of which the step loop waited `waited`, or None below the bound.

    Args:
        seconds: of the loader's parts in that window, over all its threads; empty where it keeps no timers.
        bound: share of waiting that needs no words.
    """
    share = waited / spent
    if share <= bound:
        return None
    head = f"data loading is the bottleneck: {share:.0%} of the time is spent waiting for it (log.max_data_share)"
    busy = sum(seconds.values())
    if not busy:
        return f"{head}; the loader keeps no timers, so raise loader.threads (now {threads}) first"
    part = max(seconds, key=lambda name: seconds[name])
    mend = MENDS.get(part, f"{part} is slow").format(threads=threads)
    return f"{head}; {mend} ({seconds[part] / busy:.0%} of the loader's time is {part})"
