"""Every row is run once, small: that it works and gives a figure, not how fast it is. Those of `build`: `test_run`."""

import math

import pytest

from benchmarks.case import Bench
from benchmarks.run import GROUPS

TRAINING = ("step", "peer", "held", "waited", "loss", "load")
CURATION = ("measure", "clip", "filter", "match", "cluster", "spread")
LONG = ("waited", "measure", "clip", "match", "cluster", "spread")  # ten seconds and more


def test_no_group_is_left_out() -> None:
    assert sorted((*TRAINING, *CURATION, "build")) == sorted(GROUPS)


@pytest.mark.parametrize(
    "label", [pytest.param(x, marks=pytest.mark.long if x in LONG else ()) for x in (*TRAINING, *CURATION)]
)
def test_every_row_gives_a_figure(label, tmp_path) -> None:
    group, names = GROUPS[label]
    found = {}
    for case in group(Bench(work=tmp_path, quick=True)):
        assert case.area == ("training" if label in TRAINING else "curation") and case.reach > 0 and case.peer_name
        found[case.name] = case.ours(), case.peer()
    print(found)
    assert tuple(found) == names
    for name, figures in found.items():
        assert all(math.isfinite(x) and x > 0 for x in figures), name
