"""A save that fails half-way: one line, and the checkpoint before it stays; its remains go with the next one. What
cannot be gone on from is named."""

import dataclasses
import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from curation.errors import UserError, full_disk_named
from tests.conftest import ROOT
from tests.training.conftest import largest_file, tiny_config
from tests.training.rank_zero import Toy, optim
from training import checkpoint, resumption, zero
from training.config import as_dict
from training.data import named
from training.distributed import World
from training.optim import Sharded, parameter_groups
from training.train import prepare, work


@pytest.fixture
def trained():
    return engine_of(Toy(), optim("adamw"))


def engine_of(model, config):
    """What `Saver.save` and `resume` ask of an engine without ZeRO, and its optimiser."""
    optimizer = Sharded(parameter_groups(model.named_parameters(), config), config)
    engine = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    optimizer.attach(zero.shards(engine), World())
    return engine, optimizer


def test_no_room_for_an_export_or_the_folder_itself_is_named(shards, tmp_path):
    limit, config = f"--out {tmp_path}.*: a file grows beyond the limit .* run the same command again", tiny_config()
    with largest_file(700), pytest.raises(UserError, match=limit), full_disk_named(tmp_path):
        save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")  # raises no OSError
    with largest_file(700), pytest.raises(UserError, match=limit):
        prepare(config, named(config.loader, [str(shards)]), tmp_path / "run", world_size=1, overwrite=False)
    with pytest.raises(ValueError, match="another"), full_disk_named(tmp_path):
        raise ValueError("another failure keeps its name (os error 2)")


def test_a_run_is_what_its_deepspeed_file_says_and_not_where_it_lies(shards, tmp_path):
    run = tmp_path / "run"

    def goes_on(settings, name="zero.json", ranks=2, **changes):
        (tmp_path / name).write_text(json.dumps(settings))
        config = dataclasses.replace(tiny_config("--deepspeed", str(tmp_path / name)), **changes)
        return prepare(config, named(config.loader, [str(shards)]), run, world_size=ranks, overwrite=False)

    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    assert goes_on(settings) and goes_on(settings, ranks=4) and goes_on(settings, "elsewhere.json")
    assert goes_on(settings | {"steps_per_print": 7})
    stage3 = {"zero_optimization": settings["zero_optimization"] | {"stage": 3}}
    for other in (stage3, {"communication_data_type": "bf16"}):
        with pytest.raises(UserError, match=r"holds another run \(different deepspeed\)"):
            goes_on(settings | other)
    with pytest.raises(UserError, match=r"\(different config\)"):
        goes_on(settings, seed=1)
    loader = tiny_config().loader
    assert goes_on(settings, loader=dataclasses.replace(loader, max_error_rate=0.5, error_window=7)), "raised, as asked"
    assert goes_on(settings)


def test_of_two_runs_that_start_in_a_folder_together_one_is_refused(shards, tmp_path, monkeypatch):
    """Both have found it free. The second neither gets to the other ranks nor, by --overwrite, empties the folder."""
    config, run, met = tiny_config(), tmp_path / "run", []

    class Met(Exception):
        pass

    def meet():
        met.append(1)
        raise Met

    monkeypatch.setattr("training.distributed.open_group", meet)
    monkeypatch.setattr("training.train.tune_for_cpu", lambda _: None)
    monkeypatch.setattr("training.traffic.TRAFFIC.install", lambda: None)
    data = named(config.loader, [str(shards)])
    with pytest.raises(Met):
        work(config, data, run, overwrite=False)
    held, before = sorted(os.listdir(run)), (run / "config.yaml").stat().st_mtime_ns
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"another gemsmith is at work there; wait"):
            work(config, data, run, overwrite=overwrite)
    assert len(met) == 1 and sorted(os.listdir(run)) == held
    assert (run / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize("background", [False, True])
def test_a_save_without_room_leaves_the_one_before(trained, tmp_path, background):
    saver = checkpoint.Saver(tmp_path, keep_last=2, background=background)
    saver.save(*trained, 1, {"zero_stage": 0})
    saver.wait()
    before = checkpoint.consolidated(checkpoint.latest(tmp_path))
    with largest_file(700), pytest.raises(UserError, match=r"could not be written.*make room"):
        saver.save(*trained, 2, {"zero_stage": 0})
        saver.wait()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000001"]
    after = checkpoint.consolidated(checkpoint.latest(tmp_path))
    assert all(torch.equal(after[name], before[name]) for name in before)

    again = checkpoint.Saver(tmp_path, keep_last=2, background=background)
    again.save(*trained, 3, {"zero_stage": 0})
    again.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


def test_the_last_ones_are_kept(trained, tmp_path):
    saver = checkpoint.Saver(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        saver.save(*trained, step, {"zero_stage": 0})
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("background", [False, True])
def test_a_power_cut_finds_each_file_on_the_disk_before_what_vouches_for_it(trained, tmp_path, monkeypatch, background):
    """The order of what the system is asked: bytes, then names, of the ranks' files; so of the manifest; then old
    checkpoints go."""
    saver, asked = checkpoint.Saver(tmp_path, keep_last=1, background=background), []
    saver.save(*trained, 1, {"zero_stage": 0})
    saver.wait()

    def noting(name, of):
        do = getattr(os, name)

        def noted(first, *others, **settings):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            asked.append((of, os.path.relpath(path, tmp_path)))
            return do(first, *others, **settings)

        monkeypatch.setattr(os, name, noted)

    for name, of in (("fsync", "sync"), ("rename", "name"), ("replace", "name"), ("unlink", "drop")):
        noting(name, of)
    saver.save(*trained, 2, {"zero_stage": 0})
    saver.wait()
    new, old = "checkpoints/step_00000002", "checkpoints/step_00000001"
    steps = [(of, "manifest" if ".manifest.json." in path else path) for of, path in asked]
    file = f"{new}/rank_00000.part"
    expected = [("sync", file), ("name", file), ("sync", new), ("sync", "manifest"), ("name", "manifest")]
    expected += [("sync", new), ("sync", "checkpoints"), ("sync", "."), ("drop", f"{old}/manifest.json")]
    assert [step for step in steps if step in expected] == expected
    assert not checkpoint.step_folder(tmp_path, 1).exists()


@pytest.mark.parametrize("refused", ["unlink", "rmdir"])
@pytest.mark.parametrize("background", [False, True])
def test_an_old_one_that_cannot_go_yet_ends_no_run(trained, tmp_path, monkeypatch, background, refused):
    """Its manifest is of a read-only folder; or NFS keeps its files, which a reader on another host has open."""
    saver, do = checkpoint.Saver(tmp_path, keep_last=1, background=background), getattr(os, refused)

    def busy(path, *args, **settings):
        if str(path).endswith(("step_00000001/manifest.json", "step_00000001")):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        do(path, *args, **settings)

    def folders():
        saver.wait()
        return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())

    saver.save(*trained, 1, {"zero_stage": 0})
    with monkeypatch.context() as kept:
        kept.setattr(os, refused, busy)
        saver.save(*trained, 2, {"zero_stage": 0})
        assert folders() == ["step_00000001", "step_00000002"]
        assert checkpoint.check(checkpoint.latest(tmp_path))["step"] == 2
    assert len(checkpoint.complete(tmp_path)) == (2 if refused == "unlink" else 1), "whole, or for no reader"
    saver.save(*trained, 3, {"zero_stage": 0})
    assert folders() == ["step_00000003"]


def test_a_checkpoint_of_another_model_is_named(trained, tmp_path):
    checkpoint.Saver(tmp_path, keep_last=2).save(*trained, 1, {"zero_stage": 0})
    folder, wider, other = checkpoint.latest(tmp_path), Toy(), Toy()
    wider.rarely = nn.Linear(3, 12)
    with pytest.raises(
        UserError, match=r"rarely\.bias is \[11\] there and \[12\] in this recipe; resume with the recipe"
    ):
        checkpoint.resume(*engine_of(wider, optim("adamw")), folder)
    del other.frozen
    other.added = nn.Linear(3, 3)
    without = dataclasses.replace(optim("adamw"), groups=[])
    with pytest.raises(UserError, match=r"added\.bias is None there and \[3\] in this recipe"):
        checkpoint.resume(*engine_of(other, without), folder)
    with pytest.raises(UserError, match=r"has 0 of .* values of frozen\.\w+; it belongs to another model"):
        checkpoint.resume(*engine_of(Toy(), without), folder)  # trains what had no moments


def test_a_checkpoint_that_an_older_gemsmith_saved_is_named(trained, tmp_path):
    recipe, past = as_dict(tiny_config()), {"retain": 8, "health": {}, "budget": [], "holes": {}}
    saver = checkpoint.Saver(tmp_path, keep_last=2)
    saver.save(*trained, 1, {"config": recipe, **past})
    resumption.check_resumable(checkpoint.latest(tmp_path), recipe)
    del past["budget"], past["holes"]
    saver.save(*trained, 2, {"config": recipe, **past})
    with pytest.raises(UserError, match=r"step_00000002: .* has no budget and no holes, .* resume with that one, or"):
        resumption.check_resumable(checkpoint.latest(tmp_path), recipe)


def test_a_file_that_is_no_checkpoint_is_named(trained, tmp_path):
    checkpoint.Saver(tmp_path, keep_last=2).save(*trained, 1, {"zero_stage": 0})
    folder = checkpoint.latest(tmp_path)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # what a crashed machine may leave
    with pytest.raises(UserError, match=r"rank_00000\.safetensors cannot be read .*; take another checkpoint") as error:
        checkpoint.resume(*trained, folder)
    assert "\n" not in str(error.value)
