"""A model built a parameter at a time begins from the bits of the ordinary build, in a part of its memory."""

import json

import pytest
import torch

from tests.training.conftest import tiny_config
from tests.training.rank_partitioned import LAYERS, WIDTH
from tests.training.ranks import launch
from training.data import Shards
from training.families import build


@pytest.fixture(scope="module")
def ranks(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("partitioned")
    launch("rank_partitioned.py", 2, shards, run)
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_two_ranks_begins_from_the_same_bits(ranks, shards, precision):
    found = torch.load(ranks / "beginnings.pt", weights_only=True)[precision]
    model = build(tiny_config(), ranks / "tokenizer", Shards(shards).every_caption).model
    expected = dict((model.bfloat16() if precision == "bf16" else model).named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name].float()), name


def test_no_rank_holds_the_whole(ranks):
    """288 MiB on two ranks: half of it, and what building takes for one parameter of 36 MiB at a time."""
    for rank in (0, 1):
        figures = json.loads((ranks / f"memory_{rank}.json").read_text())
        print(figures)
        whole = LAYERS * WIDTH * WIDTH * 4 / 2**20
        assert figures["same"] and figures["tracked"] < 0.15 * whole and figures["built"] < 0.3 * whole
        assert figures["parts"] < 0.85 * whole
