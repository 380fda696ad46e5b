"""One rank of the two that a test starts: rank 1 stands still before the second collective, the way it is asked to."""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist

from training.distributed import World
from training.log import open_rank_log
from training.traffic import TRAFFIC
from training.watchdog import Watchdog


def read_from_a_dead_disk() -> None:
    time.sleep(600)  # the line


def agree(world: World) -> None:
    world.sum(torch.ones(1))  # the wait


def pass_round(world: World) -> None:
    _, wait = world.pass_on({"block": torch.ones(3)}, 0)
    wait()  # the ring's wait


def main() -> None:
    run, way = Path(sys.argv[1]), sys.argv[2]
    TRAFFIC.install()
    dist.init_process_group("gloo")
    world = World.current()
    stream = open_rank_log(run, world.rank)
    # A rank that holds the interpreter leaves no word, so there is no use in waiting for it; others may be slow to.
    grace = 2.0 if way == "computes" else 60.0
    dog = Watchdog(run / "ranks", world.rank, world.size, 5.0, stream, print, grace=grace)
    dog.start(0)
    agree(world)
    dog.beat(1, "waiting for data")
    if world.rank == 1 and way in ("sleeps", "ring"):
        read_from_a_dead_disk()
    if world.rank == 1 and way == "computes":
        10**10**9  # in C, holding the interpreter's lock
    pass_round(world) if way == "ring" else agree(world)


main()
