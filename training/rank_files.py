"""What one rank writes of a checkpoint: its tensors, and a table in each file's header that names their stretches.

    rank_00000.safetensors         what it trains, and both moments; on rank 0 buffers too
    rank_00000_frozen.safetensors  what it keeps of the frozen weights

Frozen weights never change in a run, so they are written once: each later
checkpoint has a hard link to the same file. An adapter of megabytes on a
backbone of 7B would else write 28 GB at every save.

A file has its name only when all of it is on the disk, not in the machine's
memory: the manifest, written after all ranks' files, then says nothing that a
power cut could make untrue.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training import zero
from training.distributed import World
from training.optim import Sharded

WEIGHTS = "weights"
Tensors = dict[str, torch.Tensor]


def path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def frozen_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}_frozen.safetensors"


def to_disk(place: Path) -> None:
    """Have a file's bytes, or the names in a folder, outlast a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing of a folder
            raise
    finally:
        os.close(handle)


def write(file: Path, tensors: Tensors, header: dict[str, Any]) -> None:
    """
    Args:
        header: what `header_of` made of them, or more.

    Raises:
        OSError, SafetensorError: a full disk comes as either.
    """
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"table": json.dumps(header)})  # of two keys the order is drawn
        to_disk(part)
        part.rename(file)
        to_disk(file.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def link(file: Path, header: dict[str, Any]) -> bool:
    """Make `file` another name of an older checkpoint's, where that has just this header (and so these weights, by
    their hash); whether it is one now. A file system may know no links."""
    for before in sorted(file.parent.parent.glob(f"step_*/{file.name}"), reverse=True):
        with suppress(OSError, SafetensorError):
            if read_header(before) == header:
                file.parent.mkdir(parents=True, exist_ok=True)
                os.link(before, file)
                return True
    return False


def header_of(tensors: Tensors, table: dict[str, list[Any]]) -> dict[str, Any]:
    """{"stretches": {part: [[parameter, offset, size, steps]]}, "weights": their hash}; in the header of a rank's first
    file also "frozen": whether there is the other. (Older ones are the stretches alone, with the frozen ones.)"""
    return {"stretches": table, "weights": _weights_hash(tensors)}


def read_header(file: Path) -> dict[str, Any]:
    """What the file was written with."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["table"])


def _weights_hash(tensors: Tensors) -> str:
    """16 hex digits that name a rank's weights and buffers. Every rank makes its own, so that none reads another's."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        if name.startswith((WEIGHTS, "buffer.")):
            digest.update(f"{name} ".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def collect(engine: Any, optimizer: Sharded) -> tuple[Tensors, dict[str, list[Any]]]:
    """Copies of what this rank trains in host memory, and the table that names its stretches."""
    tensors: Tensors = {}
    table: dict[str, list[Any]] = {}
    for number, state in enumerate(optimizer.states.values()):
        held = state.shard.stretches if state.shard.split or World.current().rank == 0 else []
        if not held:
            continue
        flat = state.shard.flat.detach().view(-1)
        for kind, whole in ((WEIGHTS, flat), *state.moments.items()):
            # Into host memory at once: joined on a GPU, a large model's shard would be there a second time.
            out = tensors[f"{kind}.{number}"] = torch.empty(sum(s.size for s in held), dtype=whole.dtype)
            for s, part in zip(held, out.split([s.size for s in held])):
                part.copy_(whole[s.start : s.start + s.size])
        table[str(number)] = [[s.name, s.offset, s.size, taken] for s, taken in zip(held, state.steps)]
    if World.current().rank == 0:
        for name, value in _persistent_buffers(engine.module):
            tensors[f"buffer.{name}"] = value.detach().clone().cpu()
    return tensors, table


def collect_frozen(engine: Any, optimizer: Sharded) -> tuple[Tensors, dict[str, list[Any]]]:
    """The same of what it keeps of the frozen weights; empty where it keeps none."""
    tensors: Tensors = {}
    table: dict[str, list[Any]] = {}
    for number, (stretch, values) in enumerate(zero.frozen(engine).items()):
        kept = optimizer.frozen.get(stretch, values)
        tensors[f"{WEIGHTS}.frozen{number}"] = kept.detach().to("cpu", copy=True)
        table[f"frozen{number}"] = [[stretch.name, stretch.offset, stretch.size, 0]]
    return tensors, table


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in module.named_modules():
        for name, value in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, value


def shared_names(engine: Any) -> dict[str, str]:
    """Other names of what is shared: an LLM's head is often its embedding, VeRA's matrices are all layers'."""
    module = engine.module
    first = {id(x): name for name, x in (*module.named_parameters(), *_persistent_buffers(module))}
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first[id(x)] for name, x in every if first.get(id(x), name) != name}
