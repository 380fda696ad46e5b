"""A model that is built, and cut up for ZeRO-3, a parameter at a time: no rank ever holds the whole of it.

While `Deferred` is in force, the parameters of new modules give their memory
back as soon as their values have been set. What was done to each since (draws,
fills, copies) is kept, with the random generator's state at every draw, so that
the values of any one can be made again, alone and to the bit: for whatever
reads them meanwhile, and at last for `partition`. The generator moves on as in
an ordinary build, so a model begins from the same bits whether it is built
whole or in parts, on any number of ranks.

(DeepSpeed's own `zero.Init` cuts a module up as soon as its constructor has
ended; what an enclosing model then draws into it, as all of ours do, is lost.)

What is given back must also reach the system: glibc keeps freed memory of less
than 32 MiB, and before its 2.38 could not use it again for tensors, which are
aligned. Building in parts then took more than the whole.
"""

import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
OVERWRITES = {aten.normal_, aten.uniform_, aten.zero_, aten.fill_, aten.copy_}
"""What leaves nothing of the values before, when done to the whole of a parameter."""
SMALL = 4096
"""Parameters of fewer elements keep their memory: biases, norms, scales."""
KEPT = 16 << 20
"""Bytes given back after which glibc is told to do so, too; it takes milliseconds."""
THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""Has transformers load in one thread, this one: a mode of torch's does not see what other threads do."""
_LASTING: ContextVar[bool] = ContextVar("lasting", default=False)


@contextmanager
def lasting_sources() -> Iterator[None]:
    """What parameters are copied or cast from here are tensors that nobody changes any more, so they are kept in place
    of copies. Those of a file that is mapped, not read, take no memory until their parameter is made: safetensors, and
    what torch has saved since 1.6. (Held whole are older pickles, numpy's files, and what transformers fuses.)"""
    before = _LASTING.set(True)
    try:
        yield
    finally:
        _LASTING.reset(before)


@dataclass(slots=True)
class History:
    """What a parameter's values come from: (generator's state or None, operation, its arguments, other parameters among
    them) since they were last set as a whole. Empty: it still has its memory."""

    storage: torch.UntypedStorage
    size: int
    steps: list[tuple[torch.Tensor | None, Any, Any, Any, "list[History]"]] = field(default_factory=list)

    @torch.no_grad()
    def make(self) -> None:
        if self.steps and self.storage.nbytes() == 0:
            self.storage.resize_(self.size)
            now = torch.get_rng_state()
            for state, operation, args, kwargs, others in self.steps:
                empty = [other for other in others if other.steps and other.storage.nbytes() == 0]
                for other in empty:
                    other.make()
                if state is not None:
                    torch.set_rng_state(state)
                operation(*args, **kwargs)
                for other in empty:
                    other.forget()
            torch.set_rng_state(now)

    def forget(self) -> int:
        """Bytes that are given back."""
        freed = self.storage.nbytes() if self.steps else 0
        if freed:
            self.storage.resize_(0)
        return freed


class Deferred(TorchDispatchMode):
    """In force while a model is built on the CPU. peak: bytes of its parameters that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[int, History] = {}
        self.peak = self._freed = 0
        self._cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> "Deferred":
        self._hook = register_module_parameter_registration_hook(self._follow)
        self._threads = os.environ.get(THREADS)
        os.environ[THREADS] = "1"
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        self._cast = None
        del os.environ[THREADS]
        if self._threads is not None:
            os.environ[THREADS] = self._threads
        super().__exit__(*error)

    def _follow(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.numel() >= SMALL and parameter.device.type == "cpu":
            storage = parameter.untyped_storage()
            if storage.resizable() and storage._cdata not in self.histories:
                history = self.histories[storage._cdata] = History(storage, storage.nbytes())
                weakref.finalize(parameter, self._gone, storage._cdata)
                self._count()
                if self._cast is not None and self._cast[0].untyped_storage()._cdata == storage._cdata:
                    values, source = self._cast
                    if values.shape == parameter.shape:  # and not a part of it
                        history.steps = [(None, aten.copy_.default, (values, source), {}, [])]
                        self._cast = None
                        self._forget([history])

    def _count(self) -> None:
        self.peak = max(self.peak, sum(history.storage.nbytes() for history in self.histories.values()))

    def _gone(self, key: int) -> None:
        """A parameter that was replaced, or only read: what still has its memory need not be kept."""
        if key in self.histories and not self.histories[key].steps:
            del self.histories[key]

    def _forget(self, histories: Iterable[History]) -> None:
        self._freed += sum(history.forget() for history in histories)
        if self._freed > KEPT:
            self._freed = 0
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)

    def _of(self, tensor: Any) -> History | None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return None
        return self.histories.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        met = {id(h): h for t in tree_leaves((args, kwargs)) if (h := self._of(t)) is not None}
        if not met:
            result = func(*args, **kwargs)
            if func is aten._to_copy.default and _LASTING.get() and result.layout == torch.strided:
                self._cast = (result, args[0])  # which may be registered next
            return result
        if func.is_view:  # values do not matter, but torch wants the memory to be there
            empty = [h for h in met.values() if h.storage.nbytes() == 0]
            for history in empty:
                history.storage.resize_(history.size)
            result = func(*args, **kwargs)
            self._forget(empty)
            return result
        changed = [
            value
            for argument, value in [*zip(func._schema.arguments, args), *_named(func, kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written = [h for value in changed if (h := self._of(value)) is not None]
        assert len(written) <= 1, f"{func} writes into several parameters at once"
        others = [h for t in tree_leaves((args[1:], kwargs)) if (h := self._of(t)) is not None]
        whole = written and func.overloadpacket in OVERWRITES and args[0].nbytes == written[0].size
        whole = whole and all(h is not written[0] for h in others)
        step, seeded, lasting = None, torch.Tag.nondeterministic_seeded in func.tags, _LASTING.get()
        if written and (whole or written[0].steps):
            assert kwargs.get("generator") is None, f"{func} draws from a generator of its own"
            sources = tree_map_only(torch.Tensor, lambda t: t if self._of(t) is written[0] else self._copy(t), args)
            kept = [h for h in others if lasting and h is not written[0]]
            step = (torch.get_rng_state() if seeded else None, func, sources, dict(kwargs), kept)
        waits = not seeded and (lasting or len(met) == 1) and len(changed) == 1 and changed[0] is args[0]
        if step is not None and waits:
            written[0].steps = [step] if whole else [*written[0].steps, step]  # nothing is drawn: it can wait
            self._forget(written)
            return args[0]
        for history in met.values():
            if whole and history is written[0]:
                history.storage.resize_(history.size)
            else:
                history.make()
        self._count()
        result = func(*args, **kwargs)
        if step is not None:
            written[0].steps = [step] if whole else [*written[0].steps, step]
        self._forget(met.values())
        return result

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        """The values that are copied now, whatever becomes of their tensor."""
        if _LASTING.get():
            return source
        history = self._of(source)
        if history is not None:
            history.make()
        copied = source.clone()
        if history is not None:
            self._forget([history])
        return copied

    @contextmanager
    def values(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        """The parameter whole, with its values; they are gone afterwards unless it has taken others on."""
        history = self._of(parameter)
        if history is not None:
            history.make()
        yield parameter
        if history is not None:
            self._forget([history])


def _named(func: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for argument in func._schema.arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


@torch.no_grad()
def partition(
    model: nn.Module, deferred: Deferred, settings: dict[str, Any], dtype: torch.dtype
) -> dict[str, tuple[int, torch.Tensor]]:
    """Cut the parameters of a deferred model up over the ranks, one after the other, as DeepSpeed would the whole.

    Args:
        settings: of `deepspeed.initialize`.
        dtype: that the engine computes in; parameters are brought to it. Buffers keep theirs, as the engine would have
            it (rotary frequencies, statistics), and go where the parameters are.

    Returns:
        This rank's part of each frozen parameter before it was rounded, as (first element, values), by name.
    """
    from deepspeed.runtime.zero import Init

    init, exact = Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype), {}
    parameter: Any
    for name, parameter in model.named_parameters():
        with deferred.values(parameter):
            before = parameter.data.view(-1)
            if parameter.is_floating_point():
                mapped = not before.untyped_storage().resizable()  # DeepSpeed writes rank 0's values over the others'
                parameter.data = parameter.data.to(dtype, copy=mapped)
            init._convert_to_zero_parameters([parameter])
            if not parameter.requires_grad and before.dtype != dtype:
                size = parameter.partition_numel()
                exact[name] = (dist.get_rank() * size, before[dist.get_rank() * size :][:size].clone())
    deferred.histories.clear()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(init.local_device)
    return exact
