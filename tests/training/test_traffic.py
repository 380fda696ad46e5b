"""Collectives of two real gloo ranks, through DeepSpeed and beside it, against a count by hand."""

import json

from tests.training.ranks import launch


def test_two_ranks_count_what_they_send(tmp_path):
    launch("rank_traffic.py", 2, tmp_path)
    first, second = (json.loads(f.read_text()) for f in sorted(tmp_path.glob("rank_*.json")))
    assert first == second
    mib = 2**20
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
