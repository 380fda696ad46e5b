"""A checkpoint becomes a folder that transformers and open_clip open, in either precision, once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from curation.errors import UserError
from tests.conftest import gemsmith
from tests.training.conftest import TINY, largest_file
from training import checkpoint
from training.config import ObjectiveConfig
from training.export import MARK, cast, export
from training.inference import load
from training.models.clip import Clip
from training.models.clip import export as export_clip


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    recipe = ["--config", "recipes/train/tiny_mmgem.yaml", *TINY, "--samples", "64", "--checkpoint_every", "1"]
    gemsmith("train", *recipe, "--data", shards, "--out", out, "--ranks", 1)
    return out


def test_a_checkpoint_is_exported_as_the_run_exports_its_last(run, tmp_path):
    last, out = checkpoint.latest(run), tmp_path / "last"
    made_of = checkpoint.check(last)["made_of"]
    assert made_of.items() <= json.loads((run / "export" / "config.json").read_text()).items()
    assert "step 2 in fp32" in gemsmith("export", "--checkpoint", last, "--out", out).stdout
    ours, theirs = (load_file(f / "model.safetensors") for f in (out, run / "export"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load(out).step == 2
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    export(last, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps, "a finished export is left as it is"


def test_weights_are_rounded_once(run, tmp_path):
    half, first = tmp_path / "half", checkpoint.step_folder(run, 1)
    export(first, half, "bf16")
    exact, found = checkpoint.consolidated(first), load_file(half / "model.safetensors")
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in found) and len(found) > 20
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    whole, rounded = (m.embed_texts(["a thing"]) for m in (load(first), load(half)))
    assert float((whole * rounded).sum()) > 0.999
    for source, out, said in (
        (half, tmp_path / "x", "is an export already"),
        (run, tmp_path / "x", "is no checkpoint"),
        (tmp_path / "nothing", tmp_path / "x", "no such folder"),
        (checkpoint.step_folder(run, 2), half, "--overwrite"),
    ):
        with pytest.raises(UserError, match=said):
            export(source, out, "bf16")


def test_a_full_disk_is_one_line_and_the_export_before_it_stays(run, tmp_path):
    out, no_room = tmp_path / "out", f"--out {tmp_path}/out: .* run the same command again"
    first, last = (checkpoint.step_folder(run, step) for step in (1, 2))
    with largest_file(2000), pytest.raises(UserError, match=no_room):
        export(first, out)
    assert not (out / MARK).exists(), "nothing that looks complete"
    export(first, out)
    with largest_file(2000), pytest.raises(UserError, match=no_room):
        export(last, out, overwrite=True)
    assert load(out).step == 1
    export(last, out, overwrite=True)
    assert load(out).step == 2 and [file.name for file in tmp_path.iterdir()] == ["out"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, run / "export"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_open_clip_opens_a_rounded_export(tmp_path):
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = Clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, ObjectiveConfig())
    export_clip(model, model.state_dict(), {"size": [32, 32]}, tmp_path / "clip")
    cast(tmp_path / "clip", torch.bfloat16)
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    weight = model.towers.visual.conv1.weight
    assert torch.equal(opened.visual.conv1.weight.float(), weight.bfloat16().float())
