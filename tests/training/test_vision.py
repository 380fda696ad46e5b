"""Towers that a recipe names by architecture: what is exported with one opens again, and what cannot be is one line."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from curation.errors import UserError
from curation.manifest import write_manifest
from tests.training.bridges import CAPTIONS, MAPPINGS, bridge_config
from tests.training.conftest import tiny_config
from training import begin
from training.auto import AutoModel, AutoProcessor
from training.config import ObjectiveConfig, as_dict
from training.export import save
from training.families import build
from training.family_config import ClipRecipe, VisionConfig
from training.inference import load
from training.models.clip import Clip
from training.models.vision import pretrained_tower, vision_tower

NAME = "ViT-tiny-16-test"
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """An architecture of open_clip's in small, and as its published ones are: by name alone."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, CONFIG)


@pytest.mark.parametrize("kind", ["mmgem", *MAPPINGS])
def test_an_export_whose_tower_is_an_architecture_opens(kind, backbones, tmp_path):
    words = ("--mmgem.vision.arch", NAME)
    config = tiny_config(*words) if kind == "mmgem" else bridge_config(backbones, kind, *words)
    family = build(config, tmp_path / "RUN" / "tokenizer", lambda: CAPTIONS)
    model, folder = family.model.eval(), tmp_path / "RUN" / "export"
    state = {name: x.clone() for name, x in model.state_dict().items()}
    pixels = torch.randn(2, 3, 32, 32)
    written = model.generate(pixels, max_new_tokens=4)
    save(config, family, model.state_dict(), folder)
    write_manifest(folder / "gemsmith.json", {"steps": 1, "samples": 32, "config": as_dict(config)})
    for again in (AutoModel.from_pretrained(folder), load(folder).family.model):
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
        assert torch.equal(again.eval().generate(pixels, max_new_tokens=4), written)
    assert AutoProcessor.from_pretrained(folder).size == 32
    if kind == "mmgem":
        begun = begin.weights(str(folder))
        assert begun.keys() == state.keys() and torch.equal(begun["vision.conv1.weight"], state["vision.conv1.weight"])


@pytest.mark.parametrize("source", ["file", "export"])
def test_the_tower_is_that_of_open_clip_s_own_model(source, tmp_path):
    """Its activation, too: the architecture here has QuickGELU."""
    theirs = open_clip.create_model(NAME).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    recipe = VisionConfig(arch=NAME, pretrained=str(tmp_path / "open_clip_model.safetensors"))
    settings, weights = pretrained_tower(recipe if source == "file" else VisionConfig(arch=f"local-dir:{tmp_path}"))
    ours = vision_tower(settings).eval()
    ours.load_state_dict(weights)
    theirs.visual.proj, theirs.visual.output_tokens = None, True
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(pixels)[1], theirs.visual(pixels)[1])


def test_towers_that_cannot_be_are_one_line():
    field = r"^mmgem\.vision\.arch: "
    for opening, named in [
        (lambda: vision_tower({"arch": "ViT-Q-99"}), field + r"open_clip knows no 'ViT-Q-99'"),
        (lambda: vision_tower({"arch": "RN50"}), field + "RN50 has no plain ViT"),
        (lambda: vision_tower({"arch": "ViT-B-16-SigLIP"}), field + "ViT-B-16-SigLIP has no plain ViT"),
        (lambda: pretrained_tower(VisionConfig(arch=NAME, pretrained="nobody")), field + f"{NAME}: .*nobody"),
        (lambda: pretrained_tower(VisionConfig(arch="ViT-Q-99", pretrained="x")), field + "ViT-Q-99: .*not found"),
        (
            lambda: pretrained_tower(VisionConfig(arch="ViT-B-32", pretrained="openai")),
            field + "pretrained=openai was trained with QuickGELU, .* name ViT-B-32-quickgelu",
        ),
        (
            lambda: Clip.from_recipe(ClipRecipe(arch="ViT-B/32", pretrained="openai"), ObjectiveConfig()),
            r"^clip\.arch: pretrained=openai was trained with QuickGELU",
        ),
    ]:
        with pytest.raises(UserError, match=named) as error:
            opening()
        assert "\n" not in str(error.value)
