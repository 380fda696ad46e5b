"""Every family, adapter and stage built in parts: the bits of the ordinary build, also on two ranks, whose first step
is that of one process. The memory that it takes is in test_partitioned.py."""

import json

import pytest
import torch

from tests.training.beginnings import RECIPES, begun, first_step, write
from tests.training.ranks import launch
from training import checkpoint
from training.optim import parameter_groups
from training.partitioned import Deferred


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("beginnings"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_family_begins_from_the_same_bits(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr("training.partitioned.SMALL", 1)
    config = RECIPES[name](folder)
    whole = begun(config, folder / "shards", tmp_path / "tokenizer")[0].model
    after = torch.get_rng_state()
    with Deferred() as deferred:
        parts = begun(config, folder / "shards", tmp_path / "tokenizer")[0].model
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is the same too"
    held = sum(p.untyped_storage().nbytes() for p in parts.parameters())
    total = sum(p.nbytes for p in whole.parameters())
    print(name, {"whole": total, "held": held, "peak": deferred.peak})
    assert held < total / 4
    expected = dict(whole.named_parameters())
    for parameter_name, parameter in reversed(list(parts.named_parameters())):  # in any order
        with deferred.values(parameter):
            assert torch.equal(parameter, expected.pop(parameter_name)), parameter_name
    assert not expected
    for (buffer_name, buffer), other in zip(parts.named_buffers(), whole.buffers()):
        assert torch.equal(buffer, other), buffer_name


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("ranks")
    launch("rank_beginnings.py", 2, folder, run)
    return run


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_on_two_ranks_begins_from_the_same_bits_and_steps(ranks, folder, name):
    """Under bf16 what trains begins rounded, what is frozen is kept as it was; loss and gradient are the whole's."""
    config = RECIPES[name](folder)
    family, sources = begun(config, folder / "shards", ranks / name / "tokenizer")
    parameter_groups(family.model.named_parameters(), config.optim)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    frozen = {n for n, p in family.model.named_parameters() if not p.requires_grad}
    found = checkpoint.consolidated(ranks / name / "checkpoints" / "step_00000000")
    expected = family.model.state_dict()
    assert found.keys() == expected.keys()
    for n, value in expected.items():
        kept = value if n in frozen or not value.is_floating_point() else value.to(dtype)
        assert torch.equal(found[n].float(), kept.float()), n

    alone = first_step(config, family, sources)
    there = json.loads((ranks / "steps.json").read_text())[name]
    assert isinstance(there, list), there
    print(name, {"two ranks": there, "one process": alone})
    loss, norm = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 0.1)
    assert there == [pytest.approx(alone[0], rel=loss), pytest.approx(alone[1], rel=norm)]
