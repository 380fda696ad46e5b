"""The coupled losses over real gloo ranks, gathered and in a ring, against one brute-force batch in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.training.coupled_oracle import as_dict, assert_close, batch, gradients, infonce, siglip
from training.distributed import World
from training.objectives import COUPLED
from training.objectives.coupled import Rows

ORACLES = {"infonce": infonce, "siglip": siglip}
SETTINGS = {
    "symmetric": ("infonce", {"reduction": "sum"}, {}),
    "one_way": ("infonce", {"directions": "left_to_right"}, {"m": 3}),
    "masked": ("infonce", {"duplicates": "masked"}, {"m": 2, "groups": 5}),
    "positive": ("infonce", {"duplicates": "positive"}, {"m": 2, "groups": 5}),
    "holes_of_a_whole_rank": ("infonce", {}, {"holes": 0}),
    "one_rank_sinks": ("infonce", {}, {"scale": 100.0}),
    "sigmoid": ("siglip", {}, {"m": 2}),
    "sigmoid_masked": ("siglip", {"duplicates": "masked"}, {"groups": 5}),
    "sigmoid_positive": ("siglip", {"duplicates": "positive"}, {"groups": 5}),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def whole(name, dtype):
    """The global batch of 12 rows, which 1, 2 and 3 ranks share evenly."""
    left, right, scalars, rows = batch(b=12, **{"holes": 2, "seed": 7, **SETTINGS[name][2]}, dtype=dtype)
    if name == "holes_of_a_whole_rank":
        rows.valid[:6] = False
    if name == "one_rank_sinks":  # a row whose every logit is near -100: only its rank sees that sums sink
        right[:, 0] = torch.nn.functional.normalize(right[:, 0].abs() + 3.0, dim=-1)
        left[1] = -right[:, 0].mean(0) / right[:, 0].mean(0).norm()
        rows = replace(rows, valid=torch.ones(12, dtype=torch.bool))
    return left, right, scalars, rows


def rank_main(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world, out = World.current(), {}
    for name, dtype, gather in product(SETTINGS, DTYPES, ("all", "ring")):
        kind, said, _ = SETTINGS[name]
        left, right, scalars, rows = whole(name, DTYPES[dtype])
        own = slice(rank * 12 // size, (rank + 1) * 12 // size)
        groups = None if rows.groups is None else rows.groups[own]
        mine = (left[own], right[own], scalars, Rows(rows.valid[own], rows.right_valid[own], groups))
        found = COUPLED[kind](gather=gather, tile=3, keep=20, **said)(*mine, world)
        out[name, dtype, gather] = as_dict(found)
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_ranks_and_either_way_give_the_brute_force_numbers(ranks, name, dtype):
    kind, said, _ = SETTINGS[name]
    expected = gradients(ORACLES[kind], *whole(name, DTYPES[dtype]), **said)
    sinks = 20.0 if name == "one_rank_sinks" else 1.0  # the products' own rounding, at scale 100
    for gather in ("all", "ring"):
        parts = [rank[name, dtype, gather] for rank in ranks]
        for scalar in set(expected) - {"left", "right"}:
            assert all(torch.equal(part[scalar], parts[0][scalar]) for part in parts)
        found = parts[0] | {side: torch.cat([part[side] for part in parts]) for side in ("left", "right")}
        assert_close(found, expected, (1e-6 if dtype == "float32" else 1e-13) * sinks)
