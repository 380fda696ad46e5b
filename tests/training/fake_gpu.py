"""A GPU without one: torch's fake tensors follow devices and shapes and refuse what would meet on two devices.

`Stops` lies over them: it counts what would make the processor wait until a GPU has done all that it was told, and
stands in for the numbers that are asked for.
"""

from collections import Counter

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
FOUND = 3
"""Rows that a mask is taken to ask for."""


class Stops(TorchDispatchMode):
    """counted: {what: times} the processor waits for the GPU · answer: what it is told of each condition."""

    def __init__(self, answer):
        super().__init__()
        self.counted, self.answer = Counter(), answer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense:
            kind = args[0].dtype
            self.counted["number"] += args[0].is_cuda
            return self.answer if kind == torch.bool else 1.0 if kind.is_floating_point else FOUND
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
            indices = []
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.counted["mask"] += index.is_cuda
                    indices += [torch.zeros(FOUND, dtype=torch.long, device=index.device)] * index.ndim
                else:
                    indices.append(index)
            args = (args[0], indices, *args[2:])
        out = func(*args, **kwargs)
        if packet is aten._to_copy:
            self._copied(args[0], out, kwargs.get("non_blocking", False))
        elif packet is aten.copy_:
            self._copied(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return out

    def _copied(self, source, out, non_blocking):
        if source.is_cuda != out.is_cuda and not non_blocking:
            self.counted["to the GPU" if out.is_cuda else "from the GPU"] += 1


def on_gpu(model):
    """The model with fake parameters and buffers on a GPU in place of its own, as an engine moves it there; what else a
    module holds stays where it is. Inside a `FakeTensorMode`."""
    moved = {}

    def there(x):
        if id(x) not in moved:
            empty = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
            moved[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return moved[id(x)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                held[name] = None if x is None else there(x)
    return model


def fake_mode():
    return FakeTensorMode(allow_non_fake_inputs=True)
