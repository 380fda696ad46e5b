"""What this process holds in memory of its own, looked at after every large operation of torch. (A thread that looks
now and then misses what a busy machine lets it miss; the kernel's peak counts mapped files, and all that was before.)
"""

import ctypes
import gc
import re
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1 << 20


def anonymous() -> float:
    """MiB of this process's pages that are no file's. (Counters of /proc/self/status are off by some pages a core.)"""
    found = re.search(r"Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())
    assert found
    return int(found[1]) / 1024


class Resident(TorchDispatchMode):
    """most: MiB of its own that this process had inside at most, beyond what it had at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0.0

    def __enter__(self) -> "Resident":
        gc.collect()
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)  # what was freed before would be used again unseen
        self._before = anonymous()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.nbytes >= LARGE for x in tree_leaves(result)):
            self._look()
        return result

    def _look(self) -> None:
        self.most = max(self.most, anonymous() - self._before)
