"""The few collectives that training needs, the same for one process and for many.

Everything that is global in a step (embeddings, counts, metrics, the stop
flag) goes through `World`. One process needs no process group: tests and
notebooks run the very step that the cluster runs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from curation.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """Rank and size of the process group; every method is the identity at size 1.

    device: where the backend reduces (a GPU under NCCL); tensors of other devices go there and back.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls) -> "World":
        if dist.is_available() and dist.is_initialized():
            on_gpu = dist.get_backend() == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; may work in place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks; may work in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size == 1:
            return x
        there = x.to(self.device)
        dist.all_reduce(there, op=operation)
        return there.to(x.device)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of every rank, in rank order: [n, ...] -> [size * n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out

    def scatter_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, of which each keeps its own rows: [size * n, ...] -> [n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        dist.reduce_scatter_single(out, x.contiguous())
        return out

    def pass_on(self, tensors: dict[str, torch.Tensor], tag: int) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """Begin to send tensors to the next rank; what comes from the one before (shapes as sent), there once waited
        for. `tag`: tells several that are on their way apart; numbers from it on are taken, one a tensor."""
        coming = {name: torch.empty_like(x) for name, x in tensors.items()}
        operations = []
        for number, (name, x) in enumerate(tensors.items()):
            operations += [
                dist.P2POp(dist.isend, x, (self.rank + 1) % self.size, tag=tag + number),
                dist.P2POp(dist.irecv, coming[name], (self.rank - 1) % self.size, tag=tag + number),
            ]
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()

        return coming, wait

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.max(torch.tensor([float(flag)])).item())

    def first(self, work: Callable[[], T]) -> T | None:
        """What rank 0 makes by it, while the others wait and get None.

        Raises:
            Exception: on rank 0, what `work` raised there (a full disk, ...).
            UserError: on the others, which would otherwise die in their next collective, of its absence.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        if self.any(failure is not None):
            raise failure or UserError("the run has ended on rank 0, whose line says why")
        return result

    def told(self, thing: T) -> T:
        """What rank 0 has, a small thing that can be pickled, on every rank."""
        if self.size == 1:
            return thing
        one = [thing]
        dist.broadcast_object_list(one)
        return one[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def check_ranks(ranks: int) -> None:
    """
    Raises:
        UserError: none, or this host has GPUs, but fewer than ranks.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least 1; leave it out for one a GPU, or two on cores")
    if 0 < (gpus := torch.cuda.device_count()) < ranks:
        raise UserError(
            f"--ranks {ranks}: each takes a GPU, of which this host has {gpus}; start {gpus} (the plain launcher's "
            f"--num_accelerators {gpus}), or set DS_ACCELERATOR=cpu to train on its cores"
        )


def open_group() -> None:
    """Join the process group that the launcher's environment names.

    DeepSpeed shares 66 MiB a rank through /dev/shm and never takes the file away; a machine of many short runs would
    fill up. Once every rank has mapped it the name can go, and then no kill leaves it either.

    Raises:
        UserError: there is no GPU for this rank where others have one.
    """
    import deepspeed

    if torch.cuda.is_available():  # before any collective: each rank its own GPU
        local = int(os.environ.get("LOCAL_RANK", 0))
        check_ranks(local + 1)
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False  # of `precision: fp32` convolutions alone would have ten bits, unasked
    deepspeed.init_distributed(dist_backend=None, verbose=False)
    dist.barrier()
    rank, port = os.environ.get("RANK", "0"), os.environ.get("MASTER_PORT", "")
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{rank}"):
        buffer.unlink(missing_ok=True)
