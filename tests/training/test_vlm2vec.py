"""VLM2Vec on tiny real backbones: pooling, inputs, the engine's gradients against autograd, bad backbones."""

import dataclasses
import json

import pytest
import torch
import transformers
from torch.nn import functional as F

from curation.errors import UserError
from curation.manifest import write_manifest
from tests.training.plain import differences, patched_float
from tests.training.vlm import BACKBONES, CAPTIONS, RECIPE, assert_alone_as_padded, mixed_rows, picture, tiny
from training.auto import AutoModel, AutoProcessor
from training.config import ObjectiveConfig, as_dict
from training.distributed import World
from training.export import save
from training.families import build
from training.family_config import Vlm2VecRecipe
from training.gradient_cache import Outputs, gradient_cached_step
from training.inference import load
from training.models.vlm2vec import Vlm2Vec, recipe_processor
from training.models.vlm_inputs import IMAGE, Inputs, Item, Row, instruct, of_side
from training.objectives.infonce import InfoNCE
from training.train import parse

KINDS = pytest.mark.parametrize("kind", sorted(BACKBONES))


def textbook(left, right, scale, valid, right_valid):
    """InfoNCE from queries to all targets of the batch, hard negatives of every row among them, row by row."""
    candidates = [right[i, j] for i in range(len(right)) for j in range(right.shape[1]) if right_valid[i, j]]
    places = [(i, j) for i in range(len(right)) for j in range(right.shape[1]) if right_valid[i, j]]
    loss = left.new_zeros(())
    for i in range(len(left)):
        if valid[i]:
            logits = torch.stack([scale * (left[i] @ c) for c in candidates])
            loss = loss + logits.logsumexp(0) - logits[places.index((i, 0))]
    return loss / int(valid.sum())


def double(chunk):
    return {k: v.double() if v.is_floating_point() else v for k, v in chunk.items()}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_embeds_the_same_alone_and_padded_on_either_side(kind, side):
    model, inputs, _ = tiny(kind, padding_side=side)
    assert_alone_as_padded(model, inputs)


@KINDS
def test_the_embedding_is_the_backbones_own_last_state(kind):
    model, inputs, _ = tiny(kind)
    row = inputs.side([Item(text=instruct("find", "cube", True), image=picture(1))])
    with torch.no_grad():
        state = model.backbone(**row, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(model.embed(row)[0], F.normalize(state, dim=-1))


@KINDS
@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize(("negatives", "tile"), [(0, 1024), (2, 1024), (2, 2)])
def test_cached_gradients_equal_one_full_batch_pass(kind, chunk, negatives, tile):
    model, inputs, _ = tiny(kind, negatives=negatives)
    model, rows = model.double(), mixed_rows(negatives)
    whole = double(inputs.collate(rows))
    chunks = [double(inputs.collate(list(part))) for part in batched(rows, chunk)]
    right_valid = whole["right_valid"]
    assert negatives == 0 or int(right_valid[:, 1:].sum()) > 3
    with patched_float():
        out = model(whole)
        scale = out["scalars"]["log_scale"].exp()
        loss = textbook(out["left"], out["right"], scale, whole["valid"], right_valid)
        loss.backward()
        expected = gradients(model)
        model.zero_grad()
        metrics = gradient_cached_step(
            forward=lambda c, separable: Outputs(**model(c, separable=separable)),
            backward=lambda scalar: scalar.backward(),
            chunks=chunks,
            counts={},
            weights={},
            coupled=InfoNCE(directions="left_to_right", tile=tile),
            world=World(),
        )
        found = gradients(model)
    assert set(found) == set(expected) and "log_scale" in found and any("vis" in name for name in found)
    whole_error, worst = differences(found, expected)
    assert whole_error < 1e-13 and worst < 1e-12, (whole_error, worst)
    assert abs(float(metrics["loss"] - loss)) < 1e-12


@KINDS
def test_activations_computed_again_give_the_same_gradients(kind):
    model, inputs, _ = tiny(kind)
    chunk, found = inputs.collate(mixed_rows(0)), []
    model.train()
    for _ in range(2):
        model(chunk)["left"].square().mul(torch.arange(32.0)).sum().backward()
        found.append(gradients(model))
        model.zero_grad()
        model.checkpoint_activations()
    assert model.backbone.is_gradient_checkpointing
    assert found[0].keys() == found[1].keys() and max(differences(found[1], found[0])) < 1e-6


def batched(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@KINDS
def test_a_blank_picture_reaches_the_vision_tower_without_a_gradient(kind):
    """A chunk of texts alone runs every module that a chunk with pictures runs, for ZeRO-3, and moves none of them."""
    model, inputs, _ = tiny(kind)
    texts = [Row(query=Item(text=t), positive=Item(text=t + " x")) for t in ("a", "b", "c")]
    chunk = inputs.collate(texts)
    assert len(chunk["query.input_ids"]) == 4 and "query.pixel_values" in chunk and "target.pixel_values" in chunk
    model(chunk)["left"].square().sum().backward()
    vision = [p.grad for n, p in model.named_parameters() if "visual" in n or "vision_tower" in n]
    assert any(g is not None for g in vision) and all(g is None or not g.any() for g in vision)
    plain = model.embed(inputs.side([Item(text="a"), Item(text="b"), Item(text="c")], picture=False))
    assert (model(chunk)["left"] - plain).abs().max() < 1e-5


def test_texts_and_pictures_become_what_the_backbone_expects():
    for kind, token, place in [
        ("qwen2_vl", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"),
        ("qwen2_5_vl", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"),
        ("llava_next", "<image>", "<image>"),
    ]:
        _, inputs, processor = tiny(kind)
        shown = Item(text=f"{IMAGE}\nRepresent the given image.", image=picture(1))
        assert inputs.text(shown) == f"{place}\nRepresent the given image."
        assert inputs.text(dataclasses.replace(shown, image=None)) == "Represent the given image."
        assert inputs.text(Item(text="plain", image=picture(1))) == f"{place} plain"
        assert inputs.text(Item(text=f"a {token} forged")).count(token) == 0
        long = inputs.text(Item(text=f"{IMAGE} " + "a red cube " * 60, image=picture(1)))
        assert long.count(token) == 1 and len(processor.tokenizer(long.replace(place, ""))["input_ids"]) <= 41
    assert instruct("Find it.", "a cat", image=True) == f"{IMAGE} Instruct: Find it. Query: a cat"


def test_negatives_beyond_the_room_are_left_out_and_holes_have_no_targets():
    _, inputs, _ = tiny("llava_next", negatives=1)
    chunk = inputs.collate(mixed_rows(2))
    assert chunk["right_valid"].tolist() == [[True, bool(i % 3)] if i != 2 else [False, False] for i in range(7)]
    places = chunk["right_valid"].flatten().nonzero().flatten()
    assert torch.equal(chunk["target.rows"], places)
    assert len(of_side(chunk, "target")["input_ids"]) == len(places)


@KINDS
def test_saved_and_loaded_it_is_the_same_model(kind, tmp_path):
    model, inputs, processor = tiny(kind, embed_dim=12)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    again = Vlm2Vec.from_pretrained(tmp_path / "m").eval()
    chunk = inputs.collate(mixed_rows(0))
    assert torch.equal(again(chunk)["left"], model(chunk)["left"]) and model(chunk)["left"].shape == (7, 12)
    row = inputs.side([Item(text="a", image=picture(3))])
    torch.testing.assert_close(again.get_image_features(**row).pooler_output, model.embed(row).detach())
    texts = inputs.side([Item(text="a"), Item(text="a red cube")], picture=False)
    torch.testing.assert_close(again.get_text_features(**texts).pooler_output, model.embed(texts).detach())
    written = again.generate(**row, max_new_tokens=4, min_new_tokens=4)
    expected = model.backbone.generate(**row, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(written, expected[:, row["input_ids"].shape[1] :]) and written.shape == (1, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_processor_opened_again_pads_as_the_recipe_says(side, tmp_path):
    """So that texts of several lengths are written on as each alone; embeddings are the same for either side."""
    words = ["--vlm2vec.backbone", str(BACKBONES["qwen2_vl"]), "--vlm2vec.padding_side", side]
    config = parse([*RECIPE, *words])[0]
    family, export = build(config, tmp_path / "tokenizer", lambda: CAPTIONS), tmp_path / "export"
    save(config, family, family.model.state_dict(), export)
    for opened in (AutoProcessor.from_pretrained(export), transformers.AutoProcessor.from_pretrained(export)):
        assert opened.tokenizer.padding_side == side
    reading, texts = AutoProcessor.from_pretrained(export), [CAPTIONS[0], "a"]
    inputs, alone = reading(text=texts), reading(text=texts[1:])
    assert inputs["attention_mask"][1, 0 if side == "left" else -1] == 0
    if side == "left":
        model, length = family.model.eval(), {"max_new_tokens": 4, "min_new_tokens": 4}
        assert torch.equal(model.generate(**inputs, **length)[1:], model.generate(**alone, **length))


@KINDS
def test_a_pretrained_backbone_keeps_its_weights_and_its_processor(kind, tmp_path):
    model, inputs, processor = tiny(kind)
    model.backbone.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    recipe = Vlm2VecRecipe(name_or_path=str(tmp_path / "vlm"), padding_side="right")
    found, settings = recipe_processor(recipe, None, list)
    loaded = Vlm2Vec.from_recipe(recipe, settings, ObjectiveConfig(temperature=0.05)).eval()
    assert all(torch.equal(p, loaded.state_dict()[n]) for n, p in model.state_dict().items() if n != "log_scale")
    assert loaded.scalars == ("log_scale",) and float(loaded.log_scale.exp()) == pytest.approx(20)
    chunk = Inputs(found, settings, max_tokens=40).collate(mixed_rows(0))
    assert not chunk["query.attention_mask"][:, -1].all()
    assert (loaded(chunk)["left"] - model(inputs.collate(mixed_rows(0)))["left"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p, c: setattr(p.tokenizer, "pad_token", None), "no pad token"),
        (lambda p, c: setattr(p, "image_token", None), "no image token"),
        (lambda p, c: setattr(p, "image_token", "<never added>"), "no image token"),
        (lambda p, c: setattr(c, "image_token_id", 5), "image_token_id 5"),
        (lambda p, c: setattr(p, "image_processor", None), "no image processor"),
    ],
)
@KINDS
def test_a_backbone_without_its_tokens_is_one_clear_line(kind, change, named):
    model, _, processor = tiny(kind)
    config = model.backbone.config
    change(processor, config)
    with pytest.raises(UserError, match=named) as error:
        Inputs(processor, config, max_tokens=40)
    assert "\n" not in str(error.value)


def test_names_that_lead_nowhere_are_one_clear_line(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    for recipe, named in [
        (Vlm2VecRecipe(name_or_path=str(tmp_path / "absent")), "vlm2vec.name_or_path"),
        (Vlm2VecRecipe(name_or_path=str(tmp_path / "llama")), "'llama' is no AutoModelForImageTextToText"),
        (Vlm2VecRecipe(backbone={"model_type": "bert"}), "vlm2vec.backbone.model_type: 'bert'"),
    ]:
        with pytest.raises(UserError, match=named) as error:
            recipe_processor(recipe, None, lambda: ["a text"])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="exactly one of"):
        Vlm2VecRecipe()


REMOTE = """
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

class FarConfig(LlavaNextConfig):
    model_type = "far"

class FarForCausalLM(LlavaNextForConditionalGeneration):
    config_class = FarConfig
"""


def test_code_from_a_repository_runs_only_where_the_user_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, inputs, processor = tiny("llava_next")
    folder = tmp_path / "far"
    model.backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "code.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "far",
        "auto_map": {"AutoConfig": "code.FarConfig", "AutoModelForCausalLM": "code.FarForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vlm2vec\.trust_remote_code: .*far") as error:
        recipe_processor(Vlm2VecRecipe(name_or_path=str(folder)), None, list)
    assert "\n" not in str(error.value)
    recipe = Vlm2VecRecipe(name_or_path=str(folder), trust_remote_code=True)
    _, settings = recipe_processor(recipe, None, list)
    far = Vlm2Vec.from_recipe(recipe, settings, ObjectiveConfig()).eval()
    assert type(far.backbone).__name__ == "FarForCausalLM"
    chunk = inputs.collate(mixed_rows(0))
    assert (far(chunk)["left"] - model(chunk)["left"]).abs().max() < 1e-6
    far.save_pretrained(tmp_path / "saved")
    assert "trust_remote_code" not in (tmp_path / "saved" / "config.json").read_text()
    with pytest.raises(UserError, match="trust_remote_code"):
        Vlm2Vec.from_pretrained(tmp_path / "saved")

    config = parse([*RECIPE, "--vlm2vec.backbone", "null", "--vlm2vec.name_or_path", str(folder)])[0]
    config = dataclasses.replace(config, vlm2vec=dataclasses.replace(config.vlm2vec, trust_remote_code=True))
    family, export = build(config, tmp_path / "tokenizer", list), tmp_path / "export"
    save(config, family, family.model.state_dict(), export)
    write_manifest(export / "gemsmith.json", {"steps": 1, "samples": 1, "config": as_dict(config)})
    with pytest.raises(UserError, match="trust_remote_code"):
        load(export)
    words = ["a red cube", "a longer text of a blue ball"]
    wanted = family.model.eval().embed(family.encode_text(words)).detach()
    assert torch.equal(load(export, trust_remote_code=True).embed_texts(words), wanted)
    again, reading = (auto.from_pretrained(export, trust_remote_code=True) for auto in (AutoModel, AutoProcessor))
    assert type(again.backbone).__name__ == "FarForCausalLM"
    torch.testing.assert_close(again.get_text_features(**reading(text=words)).pooler_output.detach(), wanted)
