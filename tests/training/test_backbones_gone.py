"""Runs whose backbones are gone: from another folder their checkpoints and exports open as they were, to the bit, a run
is built again to resume, and one begins from another."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from curation.errors import UserError
from curation.manifest import read_manifest, write_manifest
from tests.conftest import ROOT, gemsmith
from tests.training.bridges import CAPTIONS, MAPPINGS, bridge_config
from tests.training.conftest import CLIP, TINY, clip_config, flava_config, tiny_config
from tests.training.stage2 import stage2_config
from tests.training.test_adapter_families import seen
from tests.training.test_checkpoint import engine_of
from tests.training.test_flava import published
from tests.training.test_open_clip import recipe_of, small  # noqa: F401
from tests.training.test_pretrained_llm import LOOK
from tests.training.vlm import ADAPTER, RECIPE, tiny
from training import adapters, checkpoint
from training.auto import AutoModel
from training.config import ObjectiveConfig, as_dict
from training.export import save
from training.families import build
from training.inference import Model, load, rebuild
from training.models.clip import Clip, export
from training.processor import processor_of
from training.train import parse

HERE = Path("backbones")
"""Where they are until they are gone, seen from the run's folder."""
LM = ["--mmgem.language.name_or_path", f"{HERE}/lm", "--mmgem.tokenizer.name_or_path", f"{HERE}/lm"]
NAMELESS = ["--clip.model_cfg", "null", "--clip.arch"]
VLM = [*RECIPE, "--vlm2vec.backbone", "null", "--vlm2vec.name_or_path", f"{HERE}/vlm"]
CONFIGS = {
    "mmgem": lambda: tiny_config("--mmgem.vision.arch", f"local-dir:{HERE}/clip", *LM),
    "mmgem hub": lambda: tiny_config("--mmgem.vision.arch", "hf-hub:us/ours"),
    **{kind: lambda kind=kind: bridge_config(HERE, kind) for kind in MAPPINGS},
    "clip": lambda: clip_config(*NAMELESS, f"local-dir:{HERE}/whole", "--clip.patch_dropout", "0.5"),
    "clip file": lambda: clip_config(*NAMELESS, "small-test", "--clip.pretrained", f"{HERE}/weights.safetensors"),
    "siglip": lambda: recipe_of(HERE / "siglip"),
    "flava": lambda: flava_config("--flava.name_or_path", f"{HERE}/flava"),
    "vlm2vec": lambda: parse(VLM)[0],
    "vlm2vec lora": lambda: parse([*VLM, *ADAPTER, "--adapter.init_from", f"{HERE}/adapter"])[0],
    "vlm2vec merged": lambda: parse([*VLM, *ADAPTER, "--adapter.merge", "true"])[0],
}


@pytest.fixture
def written(backbones, small, tmp_path, monkeypatch):  # noqa: F811
    """kind -> what its recipe names is under `HERE`, or on a hub that has what is there; the run's folder is the
    working one."""
    sizes = yaml.safe_load(CLIP)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-test", sizes)

    def fetched(model_id, filename=None, revision=None, cache_dir=None):
        if not (file := tmp_path / HERE / "clip" / (filename or "open_clip_model.safetensors")).exists():
            raise FileNotFoundError(file.name)
        return str(file)

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", fetched)

    def write(kind):
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(5)
        if "mmgem" in kind or kind in MAPPINGS:
            shutil.copytree(backbones, HERE)
            file = HERE / "clip" / "open_clip_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "preprocess_cfg": {"size": [32, 32], **LOOK}}))
        elif kind == "clip":
            clip = Clip(sizes, ObjectiveConfig())
            export(clip, clip.state_dict(), {"size": [32, 32], **LOOK}, HERE / "whole")
        elif kind == "clip file":
            HERE.mkdir()
            save_file(open_clip.create_model("small-test").state_dict(), HERE / "weights.safetensors")
        elif kind == "siglip":
            file = shutil.copytree(small, HERE / "siglip") / "open_clip_config.json"
            file.write_text(file.read_text().replace(str(small), str(HERE / "siglip")))
        elif kind == "flava":
            monkeypatch.chdir(ROOT)
            own = build(flava_config(), tmp_path / "other" / "tokenizer", lambda: CAPTIONS)
            monkeypatch.chdir(tmp_path)
            published(own).save_pretrained(HERE / "flava")
        else:
            model, _, processor = tiny("qwen2_vl")
            model.backbone.bfloat16().save_pretrained(HERE / "vlm")
            processor.save_pretrained(HERE / "vlm")
        if "lora" in kind:
            config = parse([*VLM, *ADAPTER])[0]
            adapters.export(build(config, tmp_path / "other", list).model, config.adapter, HERE)

    return write


def trained(kind, written, run, monkeypatch):
    """(recipe, family, what its model sees) of a run with a checkpoint and an export, whose backbones are gone."""
    monkeypatch.chdir(ROOT)
    config = CONFIGS[kind]()
    written(kind)
    family = build(config, run / "tokenizer", lambda: CAPTIONS)
    engine, optimizer = engine_of(family.model, config.optim)
    with torch.no_grad():  # far from what any backbone holds
        for number, p in enumerate(family.model.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    facts = {"samples": 32, "config": as_dict(config), "made_of": family.made_of}
    checkpoint.Saver(run, keep_last=1).save(engine, optimizer, 1, facts)
    monkeypatch.chdir(run)
    shutil.rmtree(run.parent / HERE)
    last = checkpoint.latest(run)
    # As a run exports that ends.
    save(config, rebuild(config, run / "tokenizer", family.made_of), checkpoint.consolidated(last), run / "export")
    write_manifest(run / "export/gemsmith.json", {"config": as_dict(config), "steps": 1, "samples": 32})
    can_caption = hasattr(family.model, "generate") and family.encode_images is None
    model = Model("", 0, "", {}, can_caption, family, processor_of(config, family), torch.device("cpu"))
    family.model.eval()
    return config, family, seen(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_run_wrote_opens_without_its_backbones(kind, written, tmp_path, monkeypatch):
    run = tmp_path / "RUN"
    config, family, before = trained(kind, written, run, monkeypatch)
    last = checkpoint.latest(run)
    assert_equal(seen(load(last)), before)
    if kind == "vlm2vec lora":
        with pytest.raises(UserError, match=r"is an adapter alone, .* not open \(vlm2vec\..*--merge`") as error:
            load(run / "export")
        assert "\n" not in str(error.value)
    else:
        assert_equal(seen(load(run / "export")), before, exactly=config.adapter is None)
        opened = AutoModel.from_pretrained(run / "export")
        if config.adapter is None:
            assert_same_weights(getattr(opened, "clip", opened), family.model)

    again = build(config, run / "tokenizer", pytest.fail, read_manifest(last / "manifest.json")["made_of"])
    checkpoint.resume(*engine_of(again.model, config.optim), last)
    assert_same_weights(again.model, family.model)
    trains = [{n for n, p in f.model.named_parameters() if p.requires_grad} for f in (family, again)]
    assert trains[0] == trains[1] and again.image == family.image and again.made_of == family.made_of


def assert_same_weights(found, wanted):
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in found.state_dict().items())


def assert_equal(found, wanted, exactly=True):
    assert found.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        if name == "captions":
            assert found[name] == value
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exactly else 1e-6)
            assert float((value @ value.T).min()) < 0.99999, "embeddings that differ make the comparison sharp"


def test_an_adapter_alone_opens_without_the_one_that_it_began_from(written, tmp_path, monkeypatch):
    config, folder = CONFIGS["vlm2vec lora"](), tmp_path / "RUN" / "export"
    written("vlm2vec lora")
    family = build(config, tmp_path / "tokenizer", pytest.fail)
    with torch.no_grad():
        for p in family.model.parameters():
            p.add_(0.05 * torch.randn(p.shape) if p.requires_grad else 0)
    save(config, family, family.model.state_dict(), folder)
    write_manifest(folder / "gemsmith.json", {"config": as_dict(config), "steps": 1, "samples": 32})
    before = seen(Model("", 0, "", {}, False, family, processor_of(config, family), torch.device("cpu")))
    shutil.rmtree(HERE / "adapter")
    assert_equal(seen(load(folder)), before)


@pytest.mark.parametrize("source", ["export", "checkpoint"])
def test_stage_2_begins_from_a_run_whose_backbones_are_gone(source, written, tmp_path, monkeypatch):
    run = tmp_path / "RUN"
    _, first, _ = trained("mmgem", written, run, monkeypatch)
    monkeypatch.chdir(ROOT)
    words = ("--loader.resize_mode", LOOK["resize_mode"])
    config = stage2_config("retrieval", run / "export" if source == "export" else checkpoint.latest(run), *words)
    family = build(config, tmp_path / "second" / "tokenizer", pytest.fail)
    family.prepare([])
    state = family.model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in first.model.state_dict().items())
    assert {n for n, p in family.model.named_parameters() if p.requires_grad} == {"h4.weight", "h4.bias"}
    assert (family.image.mean, family.image.interpolation) == (first.image.mean, first.image.interpolation)


@pytest.mark.long
def test_a_run_goes_on_without_its_backbones(backbones, shards, tmp_path):
    """By the launcher, to the bits of the run that was not stopped."""
    run, named = tmp_path / "RUN", shutil.copytree(backbones, tmp_path / HERE)
    lm = [word.replace(str(HERE), str(named)) for word in LM]
    words = ["--config", "recipes/train/tiny_mmgem.yaml", *TINY, "--mmgem.vision.arch", f"local-dir:{named}/clip", *lm]
    words += ["--samples", "96", "--checkpoint_every", "1", "--data", shards, "--out", run, "--ranks", "1"]
    gemsmith("train", *words)
    whole = checkpoint.consolidated(checkpoint.step_folder(run, 3))
    for remains in (run / "export", checkpoint.step_folder(run, 3), named):
        shutil.rmtree(remains)
    (run / "manifest.json").unlink()
    assert "resuming after step 2" in gemsmith("train", *words).stdout
    found = checkpoint.consolidated(checkpoint.step_folder(run, 3))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], x) for name, x in whole.items())
    assert load(run / "export").step == 3
