"""How many samples a rank keeps the graphs of, so that they need no second forward.

A step holds the graph of one chunk at a time, and the retained samples' graph
only until its backward pass, which comes before the other chunks run again. So
as many samples as fit in the memory given for graphs can be retained, and a
whole chunk always can. What a sample's graph takes (captioning and all) is
measured: the bytes that autograd saves for a chunk, of texts as long as the
recipe allows, and for half of it; of each kind of sample that the run has,
since any may come first in a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from curation.errors import UserError
from training.config import LoaderConfig
from training.distributed import World

GIB = 2**30
SHARE_OF_FREE = 0.8
"""Of a GPU's free memory, without gradients', that graphs may take: the rest is for gathered weights, the buckets that
gradients are reduced in, and fragmentation."""


def saved_bytes(forward: Callable[[], Any], parameters: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves in `forward()`, each once, weights not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in parameters}:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(storages.values())


def room_of(config: LoaderConfig, free: int | None, coming: int) -> float:
    """Bytes that graphs may take: what the recipe gives, else a share of a GPU's `free` ones (None: there is no GPU)
    without those that are `coming` to it for gradients.

    Raises:
        UserError: neither.
    """
    if config.retain_gib is not None:
        return config.retain_gib * GIB
    if free is None:
        raise UserError("loader.retain_gib: is needed beside `retain: auto` on a CPU; give the GiB a rank may hold")
    return SHARE_OF_FREE * max(0, free - coming)


def _free() -> int | None:
    """Bytes that this rank's GPU has free; None without one. What torch keeps of tensors that are gone counts as free,
    which a driver does not know: of a checkpoint that was read, of a model on its way into parts."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def choose(
    config: LoaderConfig,
    forward: Callable[[Any], Any],
    chunks: Sequence[Mapping[str, torch.Tensor]],
    parameters: list[torch.Tensor],
    world: World,
    coming: int = 0,
) -> int:
    """Samples to retain on each rank, the same everywhere: as many as fit of the kind whose graphs take most.

    Args:
        forward: a chunk, with its separable sums and a graph.
        chunks: one of each kind, of the run's own data, as large as they may be and of as many rows as each other.
        coming: bytes that the first backward pass will take for gradients.

    Raises:
        UserError: no memory is given and none can be asked for, or less than a chunk needs.
    """
    local = config.batch // world.size
    rows = len(chunks[0]["valid"])
    if rows < 2:
        return min(config.chunk, local)  # nothing to compare with; a whole chunk always fits
    room = room_of(config, _free(), coming)
    costs = []  # of each kind: bytes of a chunk, of each of its samples, of what does not grow with them
    for chunk in chunks:
        half = {name: tensor[: rows // 2].clone() for name, tensor in chunk.items()}  # a view counts as its whole
        whole, part = (saved_bytes(lambda c=c: forward(c), parameters) for c in (chunk, half))  # type: ignore[misc]
        each = max((whole - part) / (rows - rows // 2), 1.0)
        costs.append((whole, each, max(0.0, whole - each * rows)))
    fits = min(int((room - fixed) / each) for _, each, fixed in costs)
    most, each, _ = max(costs)
    fewest, widest = world.max(torch.tensor([-fits, most])).tolist()
    if config.retain_gib is not None and widest > room:
        raise UserError(
            f"loader.retain_gib: {config.retain_gib:g} is less than the {widest / GIB:.3g} GiB "
            f"that the graph of a chunk of {rows} takes; raise it or lower loader.chunk"
        )
    agreed = max(min(config.chunk, local), min(local, -fewest))
    if world.rank == 0:
        print(
            f"loader.retain: {agreed} of {local} samples a rank ({each / 2**20:.2f} MiB each, "
            f"{room / GIB:.3g} GiB given); the step costs {1 + (1 - agreed / local) / 3:.2f} of a plain one",
            flush=True,
        )
    return agreed
