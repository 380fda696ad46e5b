"""Weights that a recipe names: mapped, and made a parameter at a time where a model is built in parts, with the bits of
the ordinary load in the memory of a few parameters; and those that a name brings with it."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, FlavaForPreTraining
from transformers import FlavaConfig as TheirFlavaConfig

from curation.errors import UserError
from tests.training.bridges import CAPTIONS
from tests.training.conftest import COCA, COCA_TEXT, tiny_config
from tests.training.resident import Resident
from tests.training.vlm import QWEN
from training.config import ObjectiveConfig
from training.families import build
from training.family_config import ClipRecipe, CodebookConfig, FlavaRecipe, VisionConfig, Vlm2VecRecipe
from training.models.clip import Clip
from training.models.coca import Coca
from training.models.flava import Flava
from training.models.vision import pretrained_tower, vision_tower
from training.models.vlm2vec import Vlm2Vec, recipe_config
from training.partitioned import THREADS, Deferred

WIDE = {"width": 512, "layers": 4, "head_width": 64, "image_size": 32, "patch_size": 8}
WORDS = {"context_length": 16, "vocab_size": 1024, "width": 512, "heads": 8, "layers": 1}
TINY_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5}
TINY = {"embed_dim": 16, "vision_cfg": TINY_VISION, "text_cfg": {**COCA_TEXT, "vocab_size": 64}}
NAMED = {
    "wide": {"embed_dim": 512, "vision_cfg": WIDE, "text_cfg": WORDS},
    "wide_coca": {
        **COCA,
        "vision_cfg": {**COCA["vision_cfg"], **WIDE, "layers": 1},
        "text_cfg": {**COCA["text_cfg"], "vocab_size": 1024, "width": 512, "heads": 8},
        "multimodal_cfg": {**COCA_TEXT, "vocab_size": 1024, "width": 512, "heads": 8, "attn_pooler_heads": 8},
    },
    "tiny": TINY,
}
"""Wide ones have some 60 MiB, in matrices of 4 at most."""


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """Architectures of open_clip's by name."""
    for name, config in NAMED.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def clip(folder, suffix, name="wide", dtype=torch.float32):
    """The recipe's model with open_clip's weights, which lie in a file of this kind.

    Drawn here: open_clip leaves CoCa's head as memory was, numbers or not.
    """
    file = folder / f"weights{suffix}"
    torch.manual_seed(7)
    state = {n: torch.randn(x.shape).to(dtype) for n, x in open_clip.create_model(name).state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return lambda: Clip.from_recipe(ClipRecipe(arch=name, pretrained=str(file)), ObjectiveConfig())


def tower(folder):
    """MM-GEM around the tower of a published CLIP."""
    clip(folder, ".safetensors")
    words = ("--mmgem.vision.arch", "wide", "--mmgem.vision.pretrained", str(folder / "weights.safetensors"))
    return lambda: build(tiny_config(*words), folder / "tokenizer", lambda: CAPTIONS).model


def vlm(folder, safe):
    """VLM2Vec around a backbone in bf16, as they are published."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 512}
    config = {**QWEN, "text_config": {**QWEN["text_config"], **text}}
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "mrope_section": [32, 48, 48]}
    config["vision_config"] = {**QWEN["vision_config"], "hidden_size": 512}
    torch.manual_seed(7)
    backbone = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    backbone.bfloat16().save_pretrained(folder)
    if not safe:
        torch.save(backbone.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    recipe = Vlm2VecRecipe(name_or_path=str(folder))
    return lambda: Vlm2Vec.from_recipe(recipe, recipe_config(recipe), ObjectiveConfig())


class Vocabulary(SimpleNamespace):
    pad_token_id = 0

    def __len__(self):
        return 1024


def flava(folder):
    """FLAVA with the weights of a checkpoint of transformers'."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    layers = {"image_layers": 2, "text_layers": 1, "multimodal_layers": 1, "max_position_embeddings": 64}
    recipe = {**sizes, **layers, "image_size": 32, "embed_dim": 64, "codebook": CodebookConfig(vocab_size=64)}
    own = Flava.from_recipe(FlavaRecipe(**recipe), Vocabulary()).config
    parts = {name: getattr(own, name) for name in ("image_config", "text_config", "multimodal_config")}
    torch.manual_seed(7)
    config = TheirFlavaConfig(**parts, projection_dim=64, hidden_size=512, init_codebook=False)
    FlavaForPreTraining(config).save_pretrained(folder)
    recipe = FlavaRecipe(name_or_path=str(folder), **recipe)
    return lambda: Flava.from_recipe(recipe, Vocabulary())


LONG = pytest.mark.long
LOADS = [
    pytest.param(lambda folder: clip(folder, ".safetensors"), id="clip, safetensors", marks=LONG),
    pytest.param(lambda folder: clip(folder, ".pt", "wide_coca", torch.float16), id="coca, torch's file in fp16"),
    pytest.param(tower, id="tower, safetensors"),
    pytest.param(lambda folder: vlm(folder, safe=True), id="vlm2vec, safetensors in bf16"),
    pytest.param(lambda folder: vlm(folder, safe=False), id="vlm2vec, torch's file in bf16", marks=LONG),
    pytest.param(flava, id="flava, safetensors", marks=LONG),
]


@pytest.mark.parametrize("written", LOADS)
def test_weights_are_made_a_parameter_at_a_time_with_the_bits_of_the_ordinary_load(written, tmp_path, monkeypatch):
    monkeypatch.setattr("training.partitioned.KEPT", 4 << 20)
    load = written(tmp_path)
    torch.manual_seed(0)
    with Resident() as at_once, monkeypatch.context() as here:
        here.setenv(THREADS, "1")  # threads keep memory of their own, which would be used again unseen
        whole = load()
    after, size = torch.get_rng_state(), sum(p.nbytes for p in whole.parameters()) / 2**20
    torch.manual_seed(0)
    with Resident() as seen:
        with (deferred := Deferred()):
            parts = load()
        assert torch.equal(torch.get_rng_state(), after), "what is drawn next is the same too"
        wanted = dict(whole.named_parameters())
        for name, parameter in parts.named_parameters():
            with deferred.values(parameter):
                assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted and all(torch.equal(a, b) for a, b in zip(parts.buffers(), whole.buffers(), strict=True))
    print({"size": size, "at once": at_once.most, "in parts": seen.most, "tracked": deferred.peak / 2**20})
    assert size > 40 and at_once.most > 0.8 * size and seen.most < 0.4 * size


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_cannot_be_mapped_is_read(old, tmp_path):
    """As torch wrote them before 1.6."""
    state = open_clip.create_model("tiny").state_dict()
    torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=not old)
    _, found = pretrained_tower(VisionConfig(arch="tiny", pretrained=str(tmp_path / "weights.pt")))
    assert found and all(torch.equal(x, state[f"visual.{name}"]) for name, x in found.items())
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^mmgem\.vision\.arch: tiny: ") as error:
        pretrained_tower(VisionConfig(arch="tiny", pretrained=str(tmp_path / "weights.pt")))
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub's repository; what is not there, the hub does not have."""

    def fetched(model_id, filename=None, revision=None, cache_dir=None):
        assert model_id == "us/ours"
        if not (file := tmp_path / (filename or "open_clip_model.safetensors")).exists():
            raise FileNotFoundError(file.name)
        return str(file)

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", fetched)
    return tmp_path


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
@pytest.mark.parametrize("scheme", ["hf-hub:us/ours", "local-dir:"])
def test_a_name_that_brings_weights_begins_from_them(kind, scheme, hub):
    """As open_clip's own users expect; where there are none, open_clip would draw them at random after a warning."""
    arch = scheme if "hub" in scheme else f"{scheme}{hub}"
    config = json.loads(json.dumps(COCA if kind == "coca" else TINY))
    config |= {"init_logit_bias": -10} if kind == "siglip" else {}
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    for begin in (
        lambda: Clip.from_recipe(ClipRecipe(arch=arch), ObjectiveConfig()),
        lambda: pretrained_tower(VisionConfig(arch=arch)),
    ):
        with pytest.raises(UserError, match=r"arch: .*(could not be loaded|is no export)") as error:
            begin()
        assert "\n" not in str(error.value)
    theirs = open_clip.create_model(arch)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    save_file(theirs.state_dict(), hub / "open_clip_model.safetensors")
    objective = ObjectiveConfig(coupled="siglip" if kind == "siglip" else "infonce")
    ours = Clip.from_recipe(ClipRecipe(arch=arch), objective)
    found = ours.to_open_clip(ours.state_dict())
    assert isinstance(ours, Coca) == (kind == "coca")
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(x, found[name].reshape(x.shape)) for name, x in theirs.state_dict().items())
    assert ours.patch_dropout == config["vision_cfg"].get("patch_dropout", 0.0)
    with pytest.raises(UserError, match=r"^clip\.arch: .* brings its own weights; remove `pretrained`"):
        Clip.from_recipe(ClipRecipe(arch=arch, pretrained="openai"), objective)
    if kind != "coca":  # whose tower pools by attention
        vision, weights = pretrained_tower(VisionConfig(arch=arch))
        tower = vision_tower(vision)
        tower.load_state_dict(weights)
        assert all(torch.equal(x, theirs.state_dict()[f"visual.{name}"]) for name, x in tower.state_dict().items())
