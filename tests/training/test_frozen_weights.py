"""Frozen weights lie once on the disk, whatever number of checkpoints names them; and older checkpoints are read."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from curation.manifest import read_manifest, write_json
from tests.training.rank_zero import Toy, optim
from tests.training.test_checkpoint import engine_of
from training import checkpoint

FILE = "rank_00000_frozen.safetensors"


def saved(run, steps, keep_last=2, model=None):
    """What was trained, after a checkpoint at each of the steps, between which all weights move that may."""
    trained = engine_of(model or Toy(), optim("adamw"))
    saver = checkpoint.Saver(run, keep_last)
    for step in steps:
        with torch.no_grad():
            for p in trained[0].module.parameters():
                p.add_(step if p.requires_grad else 0)
        saver.save(*trained, step, {"zero_stage": 0})
    return trained


def inode(run, step):
    return (checkpoint.step_folder(run, step) / FILE).stat().st_ino


def assert_whole(trained, run):
    model, found = trained[0].module, checkpoint.consolidated(checkpoint.latest(run))
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items())


def test_they_are_written_once_a_run_and_outlive_the_checkpoint_that_wrote_them(tmp_path):
    trained = saved(tmp_path, (1, 2, 3, 4))
    assert [folder.name[-1] for folder in checkpoint.complete(tmp_path)] == ["3", "4"]
    assert inode(tmp_path, 3) == inode(tmp_path, 4) and os.stat(checkpoint.latest(tmp_path) / FILE).st_nlink == 2
    assert_whole(trained, tmp_path)
    with safe_open(checkpoint.latest(tmp_path) / "rank_00000.safetensors", "pt") as file:
        assert not any("frozen" in name for name in file.keys())  # noqa: SIM118
    hashes = {checkpoint.check(folder)["weights_hash"] for folder in checkpoint.complete(tmp_path)}
    assert len(hashes) == 2, "what trains has moved"


def test_a_resumed_run_links_to_them_and_one_with_others_does_not(tmp_path):
    saved(tmp_path, (1, 2), keep_last=9)
    fresh = engine_of(Toy(), optim("adamw"))
    assert checkpoint.resume(*fresh, checkpoint.latest(tmp_path)) == 2
    checkpoint.Saver(tmp_path, 9).save(*fresh, 3, {"zero_stage": 0})
    assert inode(tmp_path, 3) == inode(tmp_path, 1)
    same = [checkpoint.check(checkpoint.step_folder(tmp_path, step))["weights_hash"] for step in (2, 3)]
    assert same[0] == same[1], "nothing has moved since"
    assert_whole(fresh, tmp_path)
    other = Toy()
    other.frozen.weight.data += 1.0
    trained = saved(tmp_path, (4,), keep_last=9, model=other)
    assert inode(tmp_path, 4) != inode(tmp_path, 1)
    assert_whole(trained, tmp_path)
    assert checkpoint.check(checkpoint.latest(tmp_path))["weights_hash"] not in same


@pytest.mark.parametrize("damage", ["no links", "gone", "zeros"])
def test_where_they_cannot_be_linked_to_they_are_written_again(tmp_path, monkeypatch, damage):
    trained = saved(tmp_path, (1,), keep_last=9)
    first = checkpoint.step_folder(tmp_path, 1) / FILE
    before, number = first.read_bytes(), inode(tmp_path, 1)
    saver = checkpoint.Saver(tmp_path, 9)
    if damage == "no links":

        def refused(*_, **__):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refused)
    elif damage == "gone":
        first.unlink()
    else:
        first.write_bytes(bytes(len(before)))
    saver.save(*trained, 2, {"zero_stage": 0})
    second = checkpoint.step_folder(tmp_path, 2) / FILE
    assert second.read_bytes() == before and (damage == "gone" or second.stat().st_ino != number)
    assert_whole(trained, tmp_path)


def test_a_checkpoint_with_all_in_one_file_is_read_and_gone_on_from(tmp_path):
    """As they were written before frozen weights had a file of their own."""
    trained = saved(tmp_path, (1,))
    folder = checkpoint.latest(tmp_path)
    tensors, header, manifest = {}, {"stretches": {}}, read_manifest(folder / "manifest.json")
    for name in manifest["files"]:
        with safe_open(folder / name, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            told = json.loads(file.metadata()["table"])
        header = {"stretches": header["stretches"] | told["stretches"], "weights": told["weights"]}
    (folder / FILE).unlink()
    whole = folder / "rank_00000.safetensors"
    save_file(tensors, whole, {"table": json.dumps(header)})
    write_json(folder / "manifest.json", manifest | {"files": {whole.name: whole.stat().st_size}})
    assert_whole(trained, tmp_path)
    fresh = Toy()
    fresh.frozen.weight.data += 1.0
    resumed = engine_of(fresh, optim("adamw"))
    assert checkpoint.resume(*resumed, folder) == 1
    assert all(torch.equal(x, trained[0].module.state_dict()[name]) for name, x in fresh.state_dict().items())
    checkpoint.Saver(tmp_path, 2).save(*resumed, 2, {"zero_stage": 0})
    assert_whole(trained, tmp_path)
