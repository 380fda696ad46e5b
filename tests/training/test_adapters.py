"""Adapters: only they train, peft opens the export, merged weights are the adapted model, foreign ones are named."""

import os
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from curation.errors import UserError
from tests.training.vlm import ADAPTER, RECIPE, mixed_rows, picture, tiny
from training import adapters
from training.config import AdapterConfig, OptimConfig
from training.optim import parameter_groups

PROJECTIONS = r".*language_model.*\.(q_proj|v_proj|down_proj)"
PARTS = {"lora": "lora_", "dora": "lora_", "vera": "vera_lambda", "prompt": "prompt_encoder"}
"""The kinds, and what the names of their parameters hold."""
KINDS = tuple(PARTS)
LAYERED = ("lora", "dora", "vera")


def config(kind="lora", **changes):
    return AdapterConfig(**{"kind": kind, "module": "backbone", "r": 4, "target_modules": PROJECTIONS, **changes})


def adapted(settings, backbone="llava_next", negatives=0):
    """A tiny model with the adapter, whose values were moved away from where peft starts them (no change at all)."""
    model, inputs, _ = tiny(backbone, negatives=negatives)
    torch.manual_seed(1)
    adapters.apply(model, settings)
    moved(model)
    return model, inputs


def moved(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


def trained(model):
    """What trains of the adapted model, beside the loss's scalars."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and n not in model.scalars}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["llava_next", "qwen2_vl"])
def test_only_the_adapter_trains(kind, backbone):
    saved = [] if kind == "prompt" else ["multi_modal_projector" if backbone == "llava_next" else "merger"]
    model, inputs = adapted(config(kind, modules_to_save=saved), backbone)
    model.train()
    model(inputs.collate(mixed_rows(0)))["left"].square().mul(torch.arange(32.0)).sum().backward()
    moving = trained(model)
    assert moving and all(PARTS[kind] in n or "modules_to_save" in n for n in moving)
    assert any("modules_to_save" in n for n in moving) == bool(saved)
    assert all(p.ndim >= 1 and p.grad is not None and p.grad.any() for p in moving.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in moving)
    grouped = [p for g in parameter_groups(model.named_parameters(), OptimConfig()) for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in moving.values()} | {id(model.log_scale)}


@pytest.mark.parametrize("kind", LAYERED)
def test_peft_opens_the_exported_folder_around_the_bare_backbone(kind, tmp_path):
    settings = config(kind, modules_to_save=["multi_modal_projector"])
    model, inputs = adapted(settings)
    bare, _, _ = tiny("llava_next")
    chunk = inputs.collate(mixed_rows(0))
    with torch.no_grad():
        expected, untouched = model(chunk)["left"], bare(chunk)["left"]
        adapters.export(model, settings, tmp_path)
        bare.backbone = PeftModel.from_pretrained(bare.backbone, tmp_path / adapters.FOLDER).eval().base_model.model
        found = bare(chunk)["left"]
    assert (expected - untouched).abs().max() > 1e-3, "the adapter changes something"
    assert (found - expected).abs().max() < 1e-6
    assert not any("vocab" in n or "base_layer" in n for n in load_file(tmp_path / adapters.TRAINED))


def test_a_prompt_is_what_peft_makes_of_it(tmp_path):
    """peft's own prompt tuning around the text decoder, which knows no padding before a text: single rows."""
    settings = config("prompt", tokens=3)
    model, inputs = adapted(settings)
    adapters.export(model, settings, tmp_path)
    bare, _, _ = tiny("llava_next")
    decoder = PeftModel.from_pretrained(bare.backbone.get_decoder(), tmp_path / adapters.FOLDER).eval()
    for row in [r for r in mixed_rows(0) if r and r.query.image is None]:
        side = inputs.side([row.query], picture=False)
        with torch.no_grad():
            state = decoder(input_ids=side["input_ids"], attention_mask=side["attention_mask"]).last_hidden_state[0, -1]
            found = model.embed(side)[0]
        torch.testing.assert_close(found, state / state.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["llava_next", "qwen2_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_does_not_know_of_padding_and_writes_on(backbone, side):
    model, inputs, _ = tiny(backbone, padding_side=side)
    torch.manual_seed(1)
    adapters.apply(model, config("prompt", tokens=3))
    moved(model)
    items = [item for row in mixed_rows() if row for item in (row.query, row.positive)]
    with torch.no_grad():
        together = model.embed(inputs.side(items))[: len(items)]
        alone = torch.cat([model.embed(inputs.side([item], picture=False)) for item in items])
    assert (together - alone).abs().max() < 1e-5
    row = inputs.side([items[0]])
    with torch.no_grad():
        written = model.generate(**row, max_new_tokens=4, min_new_tokens=4)
        for _ in range(4):  # the same without a cache, a token at a time
            logits = model.backbone(**row, use_cache=False).logits[:, -1]
            row = grown(row, logits.argmax(-1))
    assert torch.equal(written, row["input_ids"][:, -4:])


def grown(row, token):
    more = {"input_ids": token, "attention_mask": torch.ones_like(token), "mm_token_type_ids": torch.zeros_like(token)}
    return {n: torch.cat([x, more[n][:, None]], 1) if n in more else x for n, x in row.items()}


@pytest.mark.parametrize("kind", LAYERED)
def test_merged_weights_are_the_adapted_model(kind):
    settings = config(kind, modules_to_save=["multi_modal_projector"])
    model, inputs = adapted(settings)
    chunk = inputs.collate(mixed_rows(0))
    with torch.no_grad():
        expected = model(chunk)["left"]
        adapters.merge(model, settings)
        assert (model(chunk)["left"] - expected).abs().max() < 1e-5
    assert set(model.state_dict()) == set(tiny("llava_next")[0].state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_read_back_and_an_adapter_begun_with(kind, tmp_path):
    settings = config(kind)
    model, inputs = adapted(settings)
    adapters.export(model, settings, tmp_path)
    again, _, _ = tiny("llava_next")
    adapters.apply(again, settings)
    again.load_state_dict(adapters.read_export(again, settings, tmp_path))
    begun, _, _ = tiny("llava_next")
    adapters.apply(begun, config(kind, init_from=str(tmp_path / adapters.FOLDER)))
    chunk = inputs.collate(mixed_rows(0))
    for other in (again, begun):
        assert torch.equal(other(chunk)["left"], model(chunk)["left"])


def test_a_foreign_adapter_is_one_clear_line(tmp_path):
    adapters.export(adapted(config())[0], config(), tmp_path)
    folder = str(tmp_path / adapters.FOLDER)
    for settings, backbone, named in [
        (config(init_from=folder), "qwen2_vl", "of another backbone"),
        (config(r=8, init_from=folder), "llava_next", "of another backbone"),
        (config("vera", init_from=folder), "llava_next", "is a LORA adapter, the recipe's is VERA"),
        (config(init_from=str(tmp_path)), "llava_next", "adapter_config.json"),
        (config(module="llm"), "llava_next", "adapter.module: the model has no 'llm'; it has backbone"),
        (config(target_modules="nothing"), "llava_next", "adapter.target_modules"),
    ]:
        with pytest.raises(UserError, match=named) as error:
            adapters.apply(tiny(backbone)[0], settings)
        assert "\n" not in str(error.value)
    model, _, _ = tiny("llava_next")
    adapters.apply(model, config(r=2))
    with pytest.raises(UserError, match="of another backbone"):
        adapters.read_export(model, config(r=2), tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", adapters.BACKBONE])
def test_an_adapter_that_is_cut_short_is_one_clear_line(name, tmp_path):
    model, _ = adapted(config())
    adapters.export(model, config(), tmp_path)
    file = tmp_path / adapters.FOLDER / name
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(UserError, match=rf"adapter\.init_from: .*{name} cannot be read .*write it again") as error:
        adapters.apply(tiny("llava_next")[0], config(init_from=str(file.parent)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_same_backbone_with_other_weights_is_one_clear_line(kind, tmp_path):
    """As it is of one that was trained on; rounded to bf16, as a checkpoint may hold it, it is the same."""
    settings = config(kind)
    model, _ = adapted(settings)
    adapters.export(model, settings, tmp_path)
    again, begun = config(kind), config(kind, init_from=str(tmp_path / adapters.FOLDER))
    other, _, _ = tiny("llava_next", seed=7)
    with pytest.raises(UserError, match=r"adapter\.init_from: .* is of another backbone: .* other values") as error:
        adapters.apply(other, begun)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"adapter: .* is of another backbone: .* other values"):
        adapters.read_export(other, again, tmp_path)
    rounded, _, _ = tiny("llava_next")
    adapters.apply(rounded.bfloat16().float(), begun)
    adapters.read_export(rounded, again, tmp_path)
    (tmp_path / adapters.FOLDER / adapters.BACKBONE).unlink()
    adapters.apply(tiny("llava_next", seed=7)[0], begun)  # peft's own folder, which does not say


def test_an_mmgem_takes_them_too(shards, tmp_path):
    from tests.training.conftest import tiny_config
    from training.data import Shards
    from training.families import build

    family = build(tiny_config(), tmp_path / "tokenizer", Shards(shards).every_caption)
    torch.manual_seed(1)
    adapters.apply(family.model, AdapterConfig(module="llm", r=2, target_modules=r".*\.(q_proj|v_proj)"))
    moving = {n.split(".")[0] for n, p in family.model.named_parameters() if p.requires_grad}
    assert moving == {"vision", "llm", "h1", "h2", "h3", "log_scale"}
    assert all("lora_" in n for n, p in family.model.named_parameters() if p.requires_grad and n.startswith("llm"))


def test_qlora_trains_on_packed_weights(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    shared = {"modules_to_save": ["multi_modal_projector"]}
    settings = config("qlora", **shared)
    model, inputs = adapted(settings)
    block = model.backbone.get_decoder().layers[0]
    layer = block.mlp.down_proj.base_layer
    assert type(layer) is bnb.nn.Linear4bit and layer.weight.dtype == torch.uint8
    assert type(block.self_attn.q_proj.base_layer) is torch.nn.Linear, "32 weights a row are no whole blocks"
    assert type(model.backbone.lm_head) is torch.nn.Linear
    chunk = inputs.collate(mixed_rows(0))
    model(chunk)["left"].square().mul(torch.arange(32.0)).sum().backward()
    moving = trained(model)
    assert all(("lora_" in n or "modules_to_save" in n) and p.grad.any() for n, p in moving.items())
    plain, _ = adapted(config("lora", **shared))  # with what the packed weights say
    for name, part in model.named_modules():
        if isinstance(part, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
            rounded = plain.get_submodule(name).weight.data
            assert 0 < (weight - rounded).abs().max() < 0.2 * rounded.abs().max()
            rounded.copy_(weight)
    assert (plain(chunk)["left"] - model(chunk)["left"]).abs().max() < 1e-4
    adapters.export(model, settings, tmp_path)
    again, _, _ = tiny("llava_next")
    adapters.apply(again, settings)
    again.load_state_dict(adapters.read_export(again, settings, tmp_path))
    assert torch.equal(again(chunk)["left"], model(chunk)["left"])


def test_qlora_without_bitsandbytes_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="qlora needs bitsandbytes"):
        adapters.apply(tiny("llava_next")[0], config("qlora"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 0}, "adapter.r"),
        ({"dropout": 1.0}, "adapter.dropout"),
        ({"target_modules": "*.q_proj"}, r"adapter.target_modules: '\*\.q_proj' is no regular expression"),
        ({"kind": "prompt", "merge": True}, "adapter.merge"),
        ({"kind": "prompt", "modules_to_save": ["x"]}, "adapter.modules_to_save"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        config(**changes)


@pytest.mark.parametrize("kind", [None, "lora", "lora merged", "prompt"])
def test_an_export_is_graded_as_the_trained_model(kind, shards, tmp_path):
    from curation.manifest import write_manifest
    from training.config import as_dict
    from training.data import Shards
    from training.families import build
    from training.inference import load, rebuild
    from training.train import parse

    chosen = [*ADAPTER, f"--adapter.kind={kind.split()[0]}", f"--adapter.merge={'merged' in kind}"] if kind else []
    config = parse([*RECIPE, *chosen])[0]
    family = build(config, tmp_path / "tokenizer", Shards(shards).every_caption)
    moved(family.model)
    family.model.eval()
    pictures, texts = [picture(i, (40, 30)) for i in range(3)], ["thing 3", "a much longer thing 4 of colour"]
    with torch.no_grad():
        images = family.model.embed(family.encode_images(pictures))
        words = family.model.embed(family.encode_text(texts))
    state = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    rebuild(config, tmp_path / "tokenizer").export(state, tmp_path / "export")
    write_manifest(tmp_path / "export" / "gemsmith.json", {"config": as_dict(config), "steps": 7, "samples": 16})
    graded = load(tmp_path / "export")
    assert (graded.embed_images(graded.images(pictures)) - images).abs().max() < 1e-5
    assert (graded.embed_texts(texts) - words).abs().max() < 1e-5
    assert graded.step == 7 and not graded.can_caption
    assert (tmp_path / "export" / adapters.FOLDER).exists() == bool(kind)
    assert (tmp_path / "export" / adapters.TRAINED).exists() == (kind in ("lora", "prompt"))
    if kind == "lora":
        (tmp_path / "export" / adapters.TRAINED).unlink()
        with pytest.raises(UserError):
            load(tmp_path / "export")
