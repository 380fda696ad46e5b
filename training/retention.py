"""How many samples a rank keeps the graphs of, so that they need no second forward.

A step holds the graph of one chunk at a time, and the retained samples' graph
only until its backward pass, which comes before the other chunks run again. So
as many samples as fit in the memory given for graphs can be retained, and a
whole chunk always can. What a sample's graph takes (captioning and all) is
measured: the bytes that autograd saves for a chunk, of texts as long as the
recipe allows, and for half of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from curation.errors import UserError
from training.config import LoaderConfig
from training.distributed import World

GIB = 2**30
SHARE_OF_FREE = 0.8
"""Of a GPU's free memory that graphs may take: the rest is for gathered weights and fragmentation."""


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


def choose(
    config: LoaderConfig,
    forward: Callable[[Any], Any],
    chunk: Mapping[str, torch.Tensor],
    parameters: list[torch.Tensor],
    world: World,
) -> int:
    """Samples to retain on each rank, the same everywhere.

    Args:
        forward: a chunk, with its separable sums and a graph.
        chunk: a chunk of the run's own data, as large as they may be.

    Raises:
        UserError: no memory is given and none can be asked for, or less than a chunk needs.
    """
    local = config.batch // world.size
    rows = len(chunk["valid"])
    if rows < 2:
        return min(config.chunk, local)  # nothing to compare with; a whole chunk always fits
    half = {name: tensor[: rows // 2] for name, tensor in chunk.items()}
    whole, part = (saved_bytes(lambda c=c: forward(c), parameters) for c in (chunk, half))  # type: ignore[misc]
    each = (whole - part) / (rows - rows // 2)
    fixed = max(0.0, whole - each * rows)
    if config.retain_gib is not None:
        room = config.retain_gib * GIB
    elif torch.cuda.is_available():
        room = SHARE_OF_FREE * torch.cuda.mem_get_info()[0]
    else:
        raise UserError("loader.retain_gib: is needed beside `retain: auto` on a CPU; give the GiB a rank may hold")
    fits = int((room - fixed) / max(each, 1.0))
    fewest, widest = world.max(torch.tensor([-fits, whole])).tolist()
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
