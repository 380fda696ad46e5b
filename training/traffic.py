"""Bytes and calls of every collective, counted at the one place that all of them pass: torch.distributed's functions.

DeepSpeed's own communication log waits for each operation to time it, and does
not see ours; a counter in front of the functions costs a microsecond a call
and sees both. It must stand before DeepSpeed opens the process group, which
keeps references to some of the functions.

Sizes are those of the whole tensor (the gathered output, the input that is
reduced and scattered, the buffer that is reduced), as nccl-tests count: what
crosses the wires is (W - 1) / W of it, twice that for an all-reduce in a ring.
Of blocks passed from rank to rank (the ring form of a coupled loss) it is what this rank sends.

The number of collectives so far also tells which rank is behind when a step hangs: see watchdog.py.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# function: (what it is, position and name of the argument that holds the whole tensor)
COLLECTIVES: dict[str, tuple[str, int, str]] = {
    "all_gather": ("all_gather", 0, "tensor_list"),
    "all_gather_single": ("all_gather", 0, "output_tensor"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "_all_gather_base": ("all_gather", 0, "output_tensor"),
    "reduce_scatter": ("reduce_scatter", 1, "input_list"),
    "reduce_scatter_single": ("reduce_scatter", 1, "input"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "_reduce_scatter_base": ("reduce_scatter", 1, "input"),
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_reduce_coalesced": ("all_reduce", 0, "tensors"),
    "reduce": ("reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_to_all_single": ("all_to_all", 1, "input"),
    "all_to_all": ("all_to_all", 1, "input_tensor_list"),
    "batch_isend_irecv": ("send", 0, "p2p_op_list"),
    "barrier": ("barrier", 0, ""),
}


class Traffic:
    """Collectives of this process. `entered`: how many have begun so far · `last`: the name of the last one."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.entered, self.last = 0, ""
        self._inside = threading.local()  # some of the functions call others

    def install(self) -> None:
        """Stand in front of torch.distributed's collectives; once, before the process group is opened."""
        for name, (kind, position, argument) in COLLECTIVES.items():
            wrapped = self._counted(getattr(distributed_c10d, name), name, kind, position, argument)
            for module in (distributed_c10d, dist):
                if hasattr(module, name):
                    setattr(module, name, wrapped)

    def _counted(self, call: Callable[..., Any], name: str, kind: str, position: int, argument: str) -> Any:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "call", False) or dist.get_world_size(kwargs.get("group")) <= 1:
                return call(*args, **kwargs)
            self._inside.call = True
            self.entered, self.last = self.entered + 1, name
            if kind != "barrier":
                self.bytes[kind] += _size(args[position] if len(args) > position else kwargs[argument])
            self.calls[kind] += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._inside.call = False

        return counted

    def take(self) -> dict[str, float]:
        """`<kind>_mib` and `<kind>_calls` since the last call."""
        found = {f"{kind}_mib": size / 2**20 for kind, size in sorted(self.bytes.items())}
        found |= {f"{kind}_calls": float(n) for kind, n in sorted(self.calls.items())}
        self.bytes.clear()
        self.calls.clear()
        return found


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of a list of them, or of those that a list of sends and receives sends."""
    if torch.is_tensor(tensors):
        return tensors.nbytes
    sent = [t.tensor if isinstance(t, dist.P2POp) else t for t in tensors if getattr(t, "op", None) is not dist.irecv]
    return sum(t.nbytes for t in sent)


TRAFFIC = Traffic()
"""Of this process: the functions are the process's, so their counter is too."""
