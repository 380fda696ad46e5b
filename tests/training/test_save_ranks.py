"""Background saves of two real gloo ranks, each with half of a parameter: whole, as of their step, or one line."""

import os
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from curation.errors import UserError
from tests.training.rank_zero import optim
from training import checkpoint
from training.distributed import World
from training.optim import Sharded, State
from training.zero import Shard, Stretch

HALF = 300_000
"""Elements of a rank: enough that a file is being written while the ranks go on."""


def rank_main(rank, folder, fails, background=True, own_disk=False):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2 * HALF))})
    optimizer = Sharded([{"params": [model["weight"]], "lr": 0.1}], optim("adamw"))
    engine = SimpleNamespace(module=model, zero_optimization_stage=lambda: 2)
    flat = torch.zeros(HALF)
    shard = Shard(flat, ("weight",), [Stretch("weight", rank * HALF, 0, HALF)], True)
    optimizer.states, optimizer.world = {id(flat): State.fresh(shard)}, World.current()
    checkpoint.APPEARS_S = 0.5
    saver = checkpoint.Saver(folder / str(rank) if own_disk else folder, keep_last=2, background=background)
    said = ""
    try:
        for step in (1, 2, 3):
            if step == 3 and fails is not None:
                saver.wait()
            if step == 3 and rank == fails:  # its disk is full: real writes past 700 bytes fail
                resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            flat.copy_(torch.arange(HALF) + 1000 * rank + step)
            saver.save(engine, optimizer, step, {"zero_stage": 2})
            flat.fill_(-1.0)  # the training goes on at once
        saver.wait()
    except UserError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    (folder / f"said_{rank}").write_text(said)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as a run ends: rank 0's writer may still wait for a file that will not come


def weights_of(step_folder):
    reader, whole = checkpoint.Reader(step_folder), torch.empty(2 * HALF)
    reader.read("weights", Stretch("weight", 0, 0, 2 * HALF), whole)
    return whole


def expected(step):
    return torch.cat([torch.arange(HALF) + 1000.0 * rank + step for rank in (0, 1)])


def test_what_is_saved_is_the_step_and_not_what_follows(tmp_path):
    mp.spawn(rank_main, (tmp_path, None), nprocs=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        folder = checkpoint.step_folder(tmp_path, step)
        assert torch.equal(weights_of(folder), expected(step))
        assert set(checkpoint.check(folder)["files"]) == {"rank_00000.safetensors", "rank_00001.safetensors"}
        assert not list(folder.glob("*.part"))
    assert not (tmp_path / "said_0").read_text() + (tmp_path / "said_1").read_text()


@pytest.mark.parametrize("fails", [0, 1])
def test_one_rank_without_room_ends_both_and_leaves_the_one_before(tmp_path, fails):
    mp.spawn(rank_main, (tmp_path, fails), nprocs=2)
    said = [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)]
    assert all("could not be written" in line and "make room" in line and "\n" not in line for line in said)
    assert "another rank" in said[1 - fails] and "another rank" not in said[fails]
    last = checkpoint.latest(tmp_path)
    assert last is not None and last.name == "step_00000002"
    assert torch.equal(weights_of(last), expected(2))


@pytest.mark.parametrize("background", [False, True])
def test_hosts_with_disks_of_their_own_are_told_and_nothing_is_called_complete(tmp_path, background):
    mp.spawn(rank_main, (tmp_path, None, background, True), nprocs=2)
    said = [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)]
    assert "rank_00001.safetensors was written, and is not seen on rank 0's host" in said[0]
    assert all("make room on a disk that all hosts share" in line for line in said)
    assert not checkpoint.complete(tmp_path / "0") and not checkpoint.complete(tmp_path / "1")
