"""Collectives of two real gloo ranks, through DeepSpeed and beside it, against a count by hand."""

import json

import pytest

from tests.training.rank_traffic import NEGATIVES, ROWS, WIDTH
from tests.training.ranks import launch

mib = 2**20


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic")
    launch("rank_traffic.py", 2, folder)
    first, second = (json.loads(f.read_text()) for f in sorted(folder.glob("rank_*.json")))
    assert first == second
    return first


def test_gathered_losses_count_what_they_send(first):
    """fp32 [B, D] of right sides and bool [B] of which are there to every rank, and the gradient [B, D] back; between
    the sweeps of a symmetric InfoNCE fp32 [B] of the columns' sums, and [B] of their factors."""
    batch = 2 * ROWS
    side, marks, numbers, groups = batch * WIDTH * 4, batch, batch * 4, batch * 8
    of = lambda name, what: (first[name][f"{what}_mib"] * mib, first[name][f"{what}_calls"])  # noqa: E731
    assert of("gathered", "all_gather") == (side + marks + numbers, 3)
    assert of("gathered", "reduce_scatter") == (side + numbers, 2)
    assert of("gathered", "all_reduce") == (2 * 8 + 4 + 2 * 4, 3), "rows that count, do sums fit, value and scale"
    assert of("one way", "all_gather") == ((1 + NEGATIVES) * (side + marks) + groups, 5)
    assert of("one way", "reduce_scatter") == ((1 + NEGATIVES) * side, 2)
    assert of("siglip", "all_gather") == (side + marks, 2)
    assert of("siglip", "reduce_scatter") == (side, 1)
    assert of("siglip", "all_reduce") == (2 * 8 + 3 * 4, 2)
    assert not any("send_calls" in first[name] for name in ("gathered", "one way", "siglip"))


def test_two_ranks_count_what_they_send(first):
    assert first["known"] == {
        "all_reduce_mib": 10 * 8 / mib,
        "all_gather_mib": (2 * 3 * 4 * 4 + 2 * 5 * 4 + 8 * 4) / mib,
        "reduce_scatter_mib": (6 * 2 * 4 + 8 * 4) / mib,
        "broadcast_mib": 7 * 2 / mib,
        "all_reduce_calls": 1,
        "all_gather_calls": 3,
        "reduce_scatter_calls": 2,
        "broadcast_calls": 1,
        "send_mib": (6 * 4 + 2 * 2 + 3 * 3 * 4) / mib,
        "send_calls": 2,
        "barrier_calls": 1,
    }
    # Two sweeps: a block goes round once, its sums twice. Right sides, 5 marks, and in the second the column factors;
    # of sums, first 5 columns', then the right sides' gradient.
    side = 5 * 4 * 4
    assert first["ring"]["send_mib"] == ((side + 5) + 2 * 5 * 4 + (side + 5 + 5 * 4) + 2 * side) / mib
    assert first["ring"]["send_calls"] == 6 and "all_gather_calls" not in first["ring"]
    layer = 64 * 64 * 4 / mib
    print(json.dumps({stage: first[stage] for stage in ("zero2", "zero3")}))
    assert first["zero3"]["reduce_scatter_mib"] == 2 * layer, "every gradient once"
    assert first["zero3"]["all_gather_mib"] == 4 * layer, "every weight for the forward and again for the backward"
    assert first["zero2"]["all_gather_mib"] == 2 * layer, "every weight after the step"
