"""The cause of slow data, from timers."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from training import bottleneck
from training.bottleneck import MENDS, Timers, apart, warning


@pytest.mark.parametrize("part", sorted(MENDS))
def test_the_slowest_part_is_named_with_its_mend(part):
    seconds = {name: 1.0 for name in MENDS} | {part: 1.5 * (len(MENDS) - 1)}
    line = warning(3.0, 10.0, seconds, threads=4, bound=0.1)
    assert line is not None and "30% of the time" in line and f"60% of the loader's time is {part}" in line
    assert MENDS[part].format(threads=4) in line and "\n" not in line


def test_below_the_bound_nothing_is_said_and_without_timers_no_cause_is_made_up():
    assert warning(1.0, 10.0, {"decode": 9.0}, threads=1, bound=0.1) is None
    line = warning(5.0, 10.0, {}, threads=1, bound=0.1)
    assert line is not None and "keeps no timers" in line and "decod" not in line


def test_a_second_counts_once_where_a_part_is_timed_apart(monkeypatch):
    now, timers = [0.0], Timers()
    monkeypatch.setattr(bottleneck, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds):
        now[0] += seconds

    with apart("decode"):
        work(64.0)  # nobody times this thread
    with timers("read"):
        work(1.0)
        for _ in range(2):
            with apart("decode"):
                work(4.0)
                with apart("tokenise"):
                    work(16.0)
        work(2.0)
    assert timers.seconds == {"read": 3.0, "decode": 8.0, "tokenise": 32.0}


def test_timers_add_up_over_threads():
    """Each part's seconds are between what its threads measured inside and outside of the timer."""
    timers = Timers()

    def work(part):
        begun = time.perf_counter()
        with timers(part):
            inside = time.perf_counter()
            time.sleep(0.05)
            inside = time.perf_counter() - inside
        return part, inside, time.perf_counter() - begun

    with ThreadPoolExecutor(4) as pool:
        measured = list(pool.map(work, ["decode", "decode", "decode", "read"]))
    assert timers.seconds.keys() == {"decode", "read"}
    for part, seconds in timers.seconds.items():
        least, most = (sum(m[n] for m in measured if m[0] == part) for n in (1, 2))
        assert least <= seconds <= most and least >= (0.15 if part == "decode" else 0.05)
