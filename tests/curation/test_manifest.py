"""`claim` when it is killed at any of its steps, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest

from curation import manifest
from curation.config import parse_config
from curation.errors import UserError
from curation.manifest import claim, occupied, occupy, write_json, write_manifest
from curation.pipeline import curate
from tests.curation.conftest import sample, write_tar
from tests.curation.test_kill import in_this_process

OLD, NEW = {"seed": 1}, {"seed": 2}


class Killed(BaseException):
    """Nothing may catch it."""


def fill(out: Path) -> None:
    claim(out, OLD)
    for name in ("manifest.json", "select.manifest.json", "checkpoints/step_1/manifest.json", "signals/manifest.json"):
        write_manifest(out / name, {})
    for name in ("a.tar", "shards/0.tar", "shards/1.tar", "checkpoints/step_1/weights", "z"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"data")


def data_of(out: Path) -> set[str]:
    files = (p for p in out.rglob("*") if p.is_file() and not p.name.endswith((".tmp", "manifest.json")))
    return {str(p.relative_to(out)) for p in files if p.name != ".identity.json"}


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th deletion or rename does not happen; a tree loses a file before it ends."""
    calls = 0

    def dying(real, half=lambda *_: None):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                half(*arguments)
                raise Killed
            return real(*arguments, **options)

        return call

    def half_of_a_tree(folder: Path, *rest: object) -> None:
        os.remove(max(p for p in Path(folder).rglob("*") if p.is_file()))

    patch.setattr(Path, "unlink", dying(Path.unlink))
    patch.setattr(os, "replace", dying(os.replace))
    patch.setattr(shutil, "rmtree", dying(shutil.rmtree, half_of_a_tree))


@pytest.mark.parametrize("listed", [sorted, lambda entries: sorted(entries, reverse=True)])
def test_an_overwrite_killed_anywhere_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed
) -> None:
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed(real(self))))  # the system gives any order
    fill(tmp_path / "whole")
    everything = data_of(tmp_path / "whole")
    for number in range(1, 30):
        out = tmp_path / str(number)
        fill(out)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                claim(out, NEW, overwrite=True, keep=("signals",))
                break
            except Killed:
                pass
        manifests = {str(p.relative_to(out)) for p in out.rglob("*manifest.json")} - {"signals/manifest.json"}
        left = data_of(out)
        if left < everything:
            assert not manifests, f"step {number}: manifests outlived {everything - left}"
            for identity in (OLD, NEW) if left else ():
                with pytest.raises(UserError, match="pass --overwrite again"):
                    claim(out, identity, keep=("signals",))
        if manifests:
            assert "manifest.json" not in manifests or len(manifests) == 3, "the folder's own goes first"
        claim(out, NEW, overwrite=True, keep=("signals",))
        assert data_of(out) == set() and (out / "signals" / "manifest.json").exists()
        assert json.loads((out / ".identity.json").read_text()) == NEW
    assert number > 10, "it was not killed at every step"


def test_what_a_killed_claim_leaves_does_not_make_the_folder_foreign(tmp_path: Path) -> None:
    for overwrite in (False, True):
        out = tmp_path / str(overwrite)
        out.mkdir()
        (out / "..identity.json.0123abcd.tmp").write_text("{")
        claim(out, OLD, overwrite=overwrite)
        claim(out, OLD)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tmp").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"not empty|not made by"):
            claim(tmp_path / "foreign", OLD, overwrite=overwrite)


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is a file"):
                claim(out, OLD, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_writers_of_one_process_do_not_share_a_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer comes in between the first one's writing and its rename."""
    real, nested = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if not nested:
            nested.append(True)
            write_json(target, "second")
        real(source, target)

    monkeypatch.setattr(manifest.os, "replace", replace)
    write_json(tmp_path / "x.json", "first")
    assert json.loads((tmp_path / "x.json").read_text()) == "first"


def test_of_two_at_work_in_a_folder_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are at work side by side, and nobody beside one that sees all of it."""
    in_this_process(monkeypatch)
    write_tar(tmp_path / "pool" / "0.tar", {"0": sample(0)})
    config, out = parse_config({"signals": {"text": {"kind": "text"}}}), tmp_path / "out"
    how = {"pools": [str(tmp_path / "pool")], "out": out}
    curate(config, **how, phase="measure")
    refused, before = r"^--out .*: another gemsmith is at work there; wait", data_of(out)
    with occupied(out, shared=True), occupied(out, shared=True):
        curate(config, **how, phase="measure", part="1/1")
        for more in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=refused):
                curate(config, **how, **more)
    with occupied(out), pytest.raises(UserError, match=refused):
        curate(config, **how, phase="measure", part="1/1")
    assert data_of(out) == before
    assert curate(config, **how)["kept"] == 1 and occupy(tmp_path / "nothing") is None


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    """As to a scratch disk that this host does not have."""
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    for out in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(UserError, match=rf"^--out {out}: {tmp_path}/out is a link to .*scratch, which is not"):
            claim(out, NEW)
    (tmp_path / "scratch").mkdir()
    claim(tmp_path / "out" / "run", NEW)
    assert (tmp_path / "scratch" / "run" / ".identity.json").is_file()
