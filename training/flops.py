"""Floating-point operations of a step, counted on the work itself, and the share of the machine that they use.

A dispatch mode adds up the products (matrix products, convolutions, attention:
torch's own formulas) of forwards and backwards whose shapes are met for the
first time; later ones of the same shapes are looked up. Nothing is estimated
from parameters or tokens: frozen towers and ragged chunks count as what they
are. (What a model skips by the values of a chunk, e.g. vocabulary logits of
padding, counts as in the first chunk of those shapes.)

Counting slows a small model's chunk down threefold, and captions come in many
lengths. So it may take `SHARE` of a run's time; a shape that comes when that is
used up counts, for now, as the nearest one known, in proportion to its elements.

    useful     one forward and one backward of every chunk: what a step without caching would do. -> mfu
    executed   the extra forward of the cached step, what activation checkpointing computes
               again, and the coupled loss, beside it.                                           -> hfu

Both are shares of a peak that is measured on this device before the run begins, in the run's precision, never read
from a table. "Model FLOPs utilisation" as in PaLM (arXiv 2204.02311, appendix B): computing again is no use.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

T = TypeVar("T")

SHARE = 0.005
"""Of a run's time, that counting may take."""

# What torch passes over: products in place, and attention on a CPU, whose fused kernels have a GPU's products.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Work(NamedTuple):
    """Operations of one call. `again`: those done with gradients on, which inside a backward means computed again
    (activation checkpointing turns them on for that; a backward's own products run without)."""

    plain: int
    again: int


class Count(TorchDispatchMode):
    """Adds up the operations of everything that runs inside it, by whether gradients were on."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = {False: 0, True: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[torch.is_grad_enabled()] += formula(*args, **kwargs, out_val=out)
        return out


@functools.lru_cache(4096)  # a run meets the same shapes over and over
def elements(key: Any) -> int:
    """Elements of all the tensors whose shapes are in a key."""
    if isinstance(key, tuple) and key and all(type(n) is int for n in key):
        return math.prod(key)
    return sum(map(elements, key)) if isinstance(key, tuple) else 0


@functools.lru_cache(4096)
def kind(key: Any) -> Any:
    """A key without the sizes in it: what keys of the same sort of work have in common."""
    if isinstance(key, tuple):
        return len(key) if key and all(type(n) is int for n in key) else tuple(map(kind, key))
    return key


def shapes(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a chunk's work depends on: names and shapes of its tensors."""
    return tuple((name, tuple(x.shape)) for name, x in sorted(values.items()) if torch.is_tensor(x))


class FlopMeter:
    """Counts this rank's work of a step; `take` gives it and begins anew. Counting takes `share` of the time."""

    def __init__(self, share: float = SHARE) -> None:
        self.share = share
        self.known: dict[Any, Work] = {}
        self.useful, self.executed = 0, 0
        self.graphs: list[Any] = []  # forwards whose backward is still to come
        self.kin: dict[Any, list[Any]] = {}  # known keys by their kind
        self.begun, self.spent = time.monotonic(), 0.0  # seconds of counting

    def forward(self, run: Callable[[], T], chunk: Mapping[str, Any], separable: bool) -> T:
        """One forward of the model: useful where a graph is kept, else the extra one of the cached step."""
        key = ("forward", torch.is_grad_enabled(), separable, shapes(chunk))
        result, work = self._count(key, run)
        self.executed += sum(work)
        if torch.is_grad_enabled():
            self.useful += sum(work)
            self.graphs.append(key)
        return result

    def backward(self, run: Callable[[], T]) -> T:
        """One backward through all forwards since the last one."""
        single = [("backward", (key,)) for key in self.graphs]
        key = ("backward", tuple(sorted(self.graphs)))
        if key not in self.known and single and all(s in self.known for s in single):
            parts = [self.known[s] for s in single]
            self.known[key] = Work(sum(p.plain for p in parts), sum(p.again for p in parts))
        self.graphs.clear()
        result, work = self._count(key, run)
        self.executed += sum(work)
        self.useful += work.plain
        return result

    def coupled(self, loss: Callable[..., T]) -> Callable[..., T]:
        """The coupled loss, whose products are executed and no use of the model's."""

        def call(*arguments: Any) -> T:
            key = ("coupled", shapes({str(n): x for n, x in enumerate(arguments)}))
            result, work = self._count(key, lambda: loss(*arguments))
            self.executed += sum(work)
            return result

        return call

    def _count(self, key: Any, run: Callable[[], T]) -> tuple[T, Work]:
        if key in self.known:
            return run(), self.known[key]
        kin = self.kin.setdefault(kind(key), [])
        if kin and self.spent > self.share * (time.monotonic() - self.begun):
            size = elements(key)
            nearest = min(kin, key=lambda k: abs(elements(k) - size))
            share = size / elements(nearest)
            return run(), Work(*(round(n * share) for n in self.known[nearest]))
        begun = time.monotonic()
        with Count() as count:
            result = run()
        self.spent += time.monotonic() - begun
        self.known[key] = Work(count.flops[False], count.flops[True])
        kin.append(key)
        return result, self.known[key]

    def forget(self) -> None:
        """Drop what was counted so far, of a trial that was no step."""
        self.graphs.clear()
        self.take()

    def take(self) -> tuple[int, int]:
        """(useful, executed) since the last call."""
        useful, executed, self.useful, self.executed = self.useful, self.executed, 0, 0
        return useful, executed


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the best square matrix product on this device, within about `seconds` a layout.

    Sides are doubled as long as that is faster, for each of the layouts that a linear layer multiplies in (a CPU's
    bf16 differs tenfold between them). All ranks measure at once, as they compute at once: ranks that share a
    device's cores share its peak.
    """
    layouts: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    layouts = [lambda a, b: a @ b, lambda a, b: a @ b.T, lambda a, b: a.T @ b]
    return max(_best(layout, device, dtype, seconds) for layout in layouts)


def _best(product: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    best, side, spent = 0.0, 128, 0.0
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product(a, b)  # the first call of a shape chooses a kernel, which a GPU takes longer to load than to run
        fastest = min(_seconds(partial(product, a, b), device) for _ in range(3))
        speed = 2 * side**3 / fastest
        spent += 4 * fastest
        if speed < 0.9 * best or spent + 4 * 8 * fastest > seconds:
            return max(best, speed)
        best, side = max(best, speed), side * 2


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
