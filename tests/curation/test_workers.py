"""How many workers curation takes when it is not told."""

import os
import time

import pytest

from curation.workers import Workers, _processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to processors")
def test_no_more_than_the_processors_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _processors() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert _processors() == len(before)


def test_on_a_cluster_no_more_than_what_is_free_and_the_same_for_every_map(ray_here: None) -> None:
    import ray

    class Holding:
        def ready(self) -> bool:
            return True

    holding = ray.remote(num_cpus=1)(Holding).remote()
    try:
        ray.get(holding.ready.remote())
        end = time.monotonic() + 20
        while ray.available_resources().get("CPU", 0) != 1 and time.monotonic() < end:  # other tests' actors go
            time.sleep(0.1)
        with Workers(None, None) as workers:
            for _ in range(2):
                assert sorted(workers.map(lambda: abs, [-1, 2, -3])) == [1, 2, 3]
                assert len(workers._actors) == 1
    finally:
        ray.kill(holding)
