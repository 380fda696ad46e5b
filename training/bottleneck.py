"""Why the training waits for data, in one line that names the slow part and the mend.

Two figures decide: how long the step loop waited for a batch, and where the
loader's threads spent their time meanwhile (`Timers`: seconds by part, summed
over its threads). Waiting alone would not tell a slow disk from slow decoding.
A second counts once: what is timed within a part is not that part's.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

MENDS = {
    "read": "the disk or network is slow: copy the shards to a local disk, or lower loader.window_shards",
    "decode": "decoding, cropping and resizing are slow: raise loader.threads (now {threads}), or set "
    "loader.cache_decoded, or lower loader.decode_size, or store smaller pictures",
    "tokenise": "tokenisation is slow, one thread at a time: lower loader.max_tokens, or use a fast tokenizer",
    "prepare": "the family's own inputs (a VLM's image processor, masks, codes, hard negatives) are slow: raise "
    "loader.threads (now {threads}), or let pictures be smaller (a VLM: vlm2vec.processor_settings)",
    "collate": "stacking and normalising pictures is slow: raise loader.threads (now {threads})",
}
"""What the parts of a loader are called, and what to do about each."""
_here = threading.local()


class Timers:
    """Seconds that the threads of a loader spend in each of its parts."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what happens inside, but for what is timed apart in there."""
        outer, _here.timers = getattr(_here, "timers", None), self
        before, _here.within = getattr(_here, "within", 0.0), 0.0
        begun = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            with self._lock:
                self._seconds[part] += took - _here.within
            _here.timers, _here.within = outer, before + took

    @property
    def seconds(self) -> dict[str, float]:
        """So far, over all threads."""
        with self._lock:
            return dict(self._seconds)


def apart(part: str) -> AbstractContextManager[None]:
    """Have what happens inside timed as `part`, by whoever times this thread; by nobody where nobody does."""
    timers = getattr(_here, "timers", None)
    return nullcontext() if timers is None else timers(part)


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
