"""Every family with every adapter, and with a part frozen by recipe: what trains, and what an export gives back."""

import json
import re

import pytest
import torch
from PIL import Image

from curation.errors import UserError
from curation.manifest import write_manifest
from tests.training.beginnings import FP32, begun, first_step, vlm_config
from tests.training.bridges import bridge_config
from tests.training.conftest import CLIP, COCA, clip_config, coca_config, flava_config, tiny_config
from tests.training.test_adapters import PARTS, moved
from training import adapters
from training.config import as_dict
from training.export import save
from training.families import build
from training.inference import Model, load, rebuild
from training.optim import parameter_groups
from training.processor import processor_of

THAWED = ("--optim.groups", "[{pattern: '^vision\\.', frozen: true}]")
"""Of a mapping, whose recipe freezes the LLM by name as well."""
FAMILIES = {
    "mmgem": ("llm", r"^vision\.", lambda _, *words: tiny_config(*words)),
    "limber": ("llm", r"^(vision|llm)\.", lambda folder, *words: bridge_config(folder, "limber", *FP32, *words)),
    "clip": ("towers", r"^towers\.visual\.", lambda _, *words: clip_config(*FP32, *words)),
    "coca": ("towers", r"^towers\.visual\.", lambda _, *words: coca_config(*words)),
    "flava": ("multimodal_model", r"^image_model\.", lambda _, *words: flava_config(*FP32, *words)),
    "vlm2vec": ("backbone", r"\.visual\.", lambda _, *words: vlm_config(*words)),
}
"""By name: the module that adapters go into, the part that is frozen by recipe, and the recipe with more words."""
REFUSED = [(name, "prompt") for name in ("clip", "coca", "flava")]
INSIDE = {**PARTS, "qlora": PARTS["lora"]}
"""By kind: what the names of its parameters hold."""
WIDE = {
    "clip": ("--clip.model_cfg", CLIP.replace("49408, width: 32", "49408, width: 64")),
    "coca": ("--clip.model_cfg", re.sub(r'"(width|embed_dim)": 16\b', r'"\1": 64', json.dumps(COCA))),
    "flava": ("--flava.hidden_size", "64"),
}
"""Of the families in whose small recipes QLoRA packs nothing, or not what the type of texts is read from: a width."""


def adapted(name, kind, backbones):
    module, _, recipe = FAMILIES[name]
    words = ("--adapter.module", module, "--adapter.kind", kind, "--adapter.r", "2", "--adapter.tokens", "3")
    words += WIDE.get(name, ()) if kind == "qlora" else ()
    return recipe(backbones, *words, *(THAWED if name == "limber" else ()))


def seen(model):
    """Embeddings or captions of three pictures and three texts."""
    pixels = model.images([Image.new("RGB", (50, 40), colour) for colour in ("red", "green", "navy")])
    found = {}
    if model.can_caption:
        found["captions"] = model.caption(pixels, max_new_tokens=6)
    if not hasattr(model.family.model, "mapping"):
        texts = ["thing 3", "a red thing", "a much longer thing 4 of colour 9"]
        found |= {"images": model.embed_images(pixels), "texts": model.embed_texts(texts)}
    return found


def taken_away(config, family, tokenizer, folder):
    """What the trained model sees, and what its export sees, written as a run does that ends."""
    model = family.model.float().eval()
    can_caption = hasattr(model, "generate") and family.encode_images is None
    before = seen(Model("", 0, "", {}, can_caption, family, processor_of(config, family), torch.device("cpu")))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    save(config, rebuild(config, tokenizer), state, folder)
    write_manifest(folder / "gemsmith.json", {"config": as_dict(config), "steps": 0, "samples": 0})
    return before, seen(load(folder))


def assert_same(before, after):
    assert before.keys() == after.keys() and before
    for name, value in before.items():
        if name == "captions":
            assert after[name] == value
        else:
            torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
            assert float((value @ value.T).min()) < 0.99999, "embeddings that differ make the comparison sharp"


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in FAMILIES for k in INSIDE if (n, k) not in REFUSED])
def test_the_adapter_alone_trains_of_its_module_and_is_read_back(name, kind, shards, backbones, tmp_path):
    config = adapted(name, kind, backbones)
    family, sources = begun(config, shards, tmp_path / "tokenizer")
    moved(family.model)
    parameters = dict(family.model.named_parameters())
    packed = {n for n, p in parameters.items() if p.dtype == torch.uint8}
    assert bool(packed) == (kind == "qlora"), "weights in blocks, and only there"
    assert kind != "qlora" or name not in ("clip", "coca") or any("mlp.c_fc" in n for n in packed)
    parameter_groups(parameters.items(), config.optim)
    trains = {n for n, p in parameters.items() if p.requires_grad}
    inside = {n for n in trains if n.startswith(f"{config.adapter.module}.")}
    assert inside and all(INSIDE[kind] in n for n in inside)
    frozen = {n.split(".")[0] for n in parameters.keys() - trains}
    assert frozen == {config.adapter.module} | ({"vision"} if name == "limber" else set())
    assert first_step(config, family, sources)[0] > 0
    assert not (idle := {n for n in inside if parameters[n].grad is None or not parameters[n].grad.any()}), idle
    assert all(p.grad is None for n, p in parameters.items() if n not in trains)

    assert_same(*taken_away(config, family, tmp_path / "tokenizer", tmp_path / "export"))
    assert {p.name for p in (tmp_path / "export").iterdir()} >= {adapters.FOLDER, adapters.TRAINED}


@pytest.mark.parametrize(
    ("name", "layer", "wide"),
    [("mmgem", "h1", ("--mmgem.vision.width", "64")), ("flava", "image_projection", ())],
)
def test_a_whole_model_may_be_packed(name, layer, wide, shards, backbones, tmp_path):
    """Pictures take the type of what is not packed."""
    module = ("--adapter", f"{{kind: qlora, module: '', r: 2, target_modules: '.*({layer}|q_proj|query)'}}")
    config = FAMILIES[name][2](backbones, *module, *WIDE.get(name, ()), *wide)
    family, sources = begun(config, shards, tmp_path / "tokenizer")
    found = family.model.get_submodule(layer).base_layer
    assert found.weight.dtype == torch.uint8
    assert first_step(config, family, sources)[0] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_frozen_by_recipe_has_no_gradient_and_the_rest_has(name, shards, backbones, tmp_path):
    _, pattern, recipe = FAMILIES[name]
    config = recipe(backbones, "--optim.groups", f"[{{pattern: '{pattern}', frozen: true, lr: null}}]")
    family, sources = begun(config, shards, tmp_path / "tokenizer")
    parameters = dict(family.model.named_parameters())
    held = {n for n in parameters if re.search(pattern, n)}
    rest = {n for n, p in parameters.items() if p.requires_grad} - held
    groups = parameter_groups(parameters.items(), config.optim)
    assert held and {id(p) for group in groups for p in group["params"]} == {id(parameters[n]) for n in rest}
    first_step(config, family, sources)
    assert all(parameters[n].grad is None for n in held)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in map(parameters.get, rest)) > 0.5 * len(rest)
    assert_same(*taken_away(config, family, tmp_path / "tokenizer", tmp_path / "export"))


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_prompt_before_what_is_no_language_model_is_one_line(name, kind, backbones, tmp_path):
    with pytest.raises(UserError, match=r"adapter\.module: a prompt needs a transformers language model") as error:
        build(adapted(name, kind, backbones), tmp_path / "tokenizer", lambda: ["a thing"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        ("limber", ("--adapter.module", "llm"), r"optim\.groups: .* freezes the adapter in llm"),
        ("clip", ("--adapter", "{module: towers, target_modules: '.*out_proj'}"), "part of torch's attention"),
    ],
)
def test_an_adapter_that_could_not_learn_is_one_line(name, words, named, backbones, tmp_path):
    with pytest.raises(UserError, match=named) as error:
        build(FAMILIES[name][2](backbones, *words), tmp_path / "tokenizer", lambda: ["a thing"])
    assert "\n" not in str(error.value)
