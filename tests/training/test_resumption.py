"""Two real gloo ranks, each with its own view of the run, as two hosts have of a network's file system."""

import errno
import os
import shutil
import threading

import torch.distributed as dist
import torch.multiprocessing as mp

from curation.errors import UserError
from curation.manifest import write_manifest
from training import checkpoint
from training.distributed import World
from training.resumption import agreed, await_made

LATE = 0.7
"""Seconds after which rank 1 sees what rank 0 has seen all the time."""


def land(run, step):
    """A checkpoint with one file, its manifest last."""
    folder = checkpoint.step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "rank_00000.safetensors").write_bytes(b"weights")
    write_manifest(folder / "manifest.json", {"step": step, "files": {"rank_00000.safetensors": 7}})


def make(run):
    (run / "tokenizer").mkdir(exist_ok=True)
    (run / "tokenizer" / "tokenizer.json").write_text("words")


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world, run = World.current(), folder / str(rank)
    told = [agreed(run / "empty", world)]
    land(run, 4)
    if rank == 0:
        land(run, 8)
    checkpoint.APPEARS_S, late = 30.0, threading.Timer(LATE, land, (run, 8))
    if rank == 1:
        late.start()
    told.append(agreed(run, world))
    told.append(agreed(run, world))
    last = checkpoint.step_folder(run, 8)
    if rank == 1:  # its manifest is seen, a file of it is not yet
        late.join()
        (last / "rank_00000.safetensors").rename(last / "elsewhere")
        threading.Timer(LATE, (last / "elsewhere").rename, (last / "rank_00000.safetensors",)).start()
    told.append(agreed(run, world))
    dist.barrier()
    if rank == 0:  # an older one counts that rank 0 sees, and none that the other alone does
        shutil.rmtree(last)
    told.append(agreed(run, world))
    if rank == 1:
        shutil.rmtree(checkpoint.step_folder(run, 4))
    checkpoint.APPEARS_S = 0.2
    for wait in (lambda: agreed(run, world), lambda: await_made(run, ["tokenizer"], world)):
        if rank == 0:
            make(run)
        try:
            wait()
        except UserError as error:
            told.append(error)
    checkpoint.APPEARS_S = 30.0
    if rank == 1:  # a file of it is there before it is whole
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.json").write_text("wor")
        threading.Timer(LATE, make, (run,)).start()
    await_made(run, ["tokenizer", "codebook"], world)
    assert (run / "tokenizer" / "tokenizer.json").read_text() == "words"
    await_made(run / "nothing", ["tokenizer"], world)
    (folder / f"told_{rank}").write_text("\n".join(str(line).replace(str(run), "RUN") for line in told))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


def test_ranks_go_on_from_the_checkpoint_that_rank_0_sees_or_end_together(tmp_path):
    mp.spawn(rank_main, (tmp_path,), nprocs=2)
    steps = ["None", *(f"RUN/checkpoints/step_{step:08d}" for step in (8, 8, 8, 4))]
    for rank, who in ((0, "another rank"), (1, "rank 1")):
        *found, resumes, makes = (tmp_path / f"told_{rank}").read_text().splitlines()
        assert found == steps
        end = f"and {who} does not see all of it within 0.2 s; put --out on a disk that all hosts share"
        assert resumes == f"--out RUN/checkpoints/step_00000004: rank 0 resumes from it, {end}"
        assert makes == f"--out RUN: rank 0 has made tokenizer there, {end}"


def test_a_checkpoint_that_another_host_removes_is_passed_over(tmp_path, monkeypatch):
    land(tmp_path, 4)
    land(tmp_path, 8)
    look = os.stat

    def stale(path, *args, **kwargs):
        if str(path).endswith("step_00000004/manifest.json"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_00000008"]
    monkeypatch.setattr(os, "listdir", lambda path: shutil.rmtree(path) or look(path))  # a new run's --overwrite
    assert checkpoint.complete(tmp_path) == []
