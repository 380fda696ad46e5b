"""People who take a model away: the README's lines run, and every family's folder gives what was graded."""

import dataclasses
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from curation.errors import UserError
from tests.conftest import ROOT
from tests.training.bridges import MAPPINGS, bridge_config
from tests.training.conftest import clip_config, coca_config, flava_config, siglip_config, tiny_config, write_shards
from tests.training.vlm import BACKBONES, RECIPE
from training.auto import AutoModel, AutoProcessor
from training.data import Loader, Shards
from training.export import cast, save
from training.families import build
from training.models.vlm_inputs import of_side
from training.train import parse

COLOURS, SHAPES, TABLES = ("red", "blue", "green"), ("cube", "ball"), ("low", "oak")
CAPTIONS = [f"a {c} {s} on a {t} table" for c in COLOURS for s in SHAPES for t in TABLES]
TEXTS = ["a red cube on an oak table", "a ball", "An overlong text, " + "word by word, " * 40]
LORA = ["--adapter.r", "4", "--adapter.merge", "true"]
QWEN = ["--vlm2vec.backbone", str(BACKBONES["qwen2_vl"])]
CONFIGS = {
    "mmgem": lambda: tiny_config("--loader.max_tokens", "20"),
    "mmgem_shortest": lambda: tiny_config("--loader.resize_mode", "shortest"),
    "mmgem_merged": lambda: tiny_config(*LORA, "--adapter.module", "llm"),
    "flava": flava_config,
    "clip": clip_config,
    "siglip": siglip_config,
    "coca": coca_config,
    "vlm2vec": lambda: parse([*RECIPE, *QWEN])[0],
    "vlm2vec_merged": lambda: parse([*RECIPE, *QWEN, *LORA, "--adapter.module", "backbone"])[0],
}


def pictures(count=7):
    """Pictures of several sizes and modes."""
    rng = np.random.default_rng(3)
    found = [Image.fromarray(rng.integers(0, 256, (20 + 9 * n, 64 - 5 * n, 3), np.uint8)) for n in range(count)]
    return [*found[:-2], found[-2].convert("L"), found[-1].convert("P")]


@pytest.fixture(scope="module")
def taken(tmp_path_factory, backbones):
    """kind -> (folder as the run exports it, the family with the weights in it)"""
    known = {}

    def export(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            config = bridge_config(backbones, kind) if kind in MAPPINGS else CONFIGS[kind]()
            family = build(config, folder / "tokenizer", lambda: CAPTIONS)
            with torch.no_grad():  # far from what any class begins with
                for number, p in enumerate(family.model.parameters()):
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
            save(config, family, family.model.state_dict(), folder / "RUN" / "export")
            known[kind] = folder / "RUN" / "export", config, family
        return known[kind]

    return export


def test_the_readme_s_lines_run(taken, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "the README has its example"
    lines = [line for line in block[1].splitlines() if line]
    assert len(lines) <= 12 and any("generate" in line for line in lines)
    folder, _, family = taken("mmgem")
    monkeypatch.chdir(folder.parent.parent)
    found = {"pictures": pictures(), "texts": TEXTS}
    exec(block[1], found)
    images, queries, n = found["images"], found["queries"], len(found["pictures"])
    assert images.shape == (n, 24) and queries.shape == (3, 24)
    assert np.allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    order = np.argsort(-(queries.astype(np.float64) @ images.T.astype(np.float64)), axis=1)[:, :3]
    assert np.array_equal(found["found"], order)
    ids = family.model.eval().generate(found["seen"]["pixel_values"])
    assert found["captions"] == family.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(found["captions"]) == n


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_embeds_as_the_trained_model_does(kind, taken, tmp_path):
    """The oracle goes by the ways of training: the family's own text tensors, torchvision's resizing by Pillow, or a
    chunk of the loader."""
    folder, config, family = taken(kind)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    trained = family.model.eval()
    shown, texts = pictures(), TEXTS[: 2 if family.encode_images else 3]
    if family.encode_images:
        wanted = trained.embed(of_chunk(shown, config, family, tmp_path / "shards"))
    else:
        pixels = torch.stack([by_hand(picture, family.image) for picture in shown])
        assert torch.allclose(processor(images=shown)["pixel_values"], pixels, atol=1e-6)
        towers = getattr(trained, "towers", None)
        wanted = towers.encode_image(pixels) if towers else trained.get_image_features(pixels).pooler_output
    found = model.get_image_features(**processor(images=shown)).pooler_output
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    assert torch.allclose(found, wanted, atol=2e-6) and found.dtype == torch.float32
    assert float((found @ found.T).min()) < 0.9999, "embeddings that differ make the comparison sharp"

    inputs = family.encode_text(texts)
    if hasattr(trained, "towers"):
        wanted = torch.nn.functional.normalize(trained.towers.encode_text(inputs["input_ids"]), dim=-1)
    elif "attention_mask" in inputs:
        wanted = trained.get_text_features(**inputs).pooler_output
    else:
        wanted = trained.get_text_features(inputs["input_ids"]).pooler_output
    assert torch.allclose(model.get_text_features(**processor(text=texts)).pooler_output, wanted, atol=2e-6)
    alone = [model.get_text_features(**processor(text=text)).pooler_output for text in texts]
    assert torch.allclose(torch.cat(alone), wanted, atol=2e-5), "a text alone is the text among others"


def of_chunk(shown, config, family, folder):
    """The queries that training makes of these pictures, in their order."""

    def png(number):
        shown[number].save(buffer := io.BytesIO(), "PNG")
        return {"png": buffer.getvalue()}

    write_shards(folder, [len(shown)], pictures=png)
    settings = dataclasses.replace(config.loader, batch=len(shown), chunk=len(shown))
    ours = {"seed": 0, "rank": 0, "world_size": 1, "extra": family.extra}
    loader = Loader(Shards(folder), settings, family.image, family.encode_text, **ours)
    ((chunk,),) = loader.batches(0, 1)
    assert chunk["valid"].all()
    query, order = of_side(chunk, "query"), [int(key) for key in loader.ids(0)]
    starts = np.cumsum([0, *query["image_grid_thw"].prod(1).tolist()])
    places = [order.index(number) for number in range(len(shown))]
    patches = [query["pixel_values"][starts[place] : starts[place + 1]] for place in places]
    return {name: x[places] for name, x in query.items()} | {"pixel_values": torch.cat(patches)}


def pooled_by_hand(kind, model, image, text, inputs):
    """Embeddings before they are made unit vectors, from the states that the features say they were pooled from."""
    ids = inputs["text"]["input_ids"]
    if kind == "mmgem":
        at = (ids == model.config.emb_token_id).int().argmax(1)
        return model.h1(image).mean(1), model.h2(text[torch.arange(len(ids)), at])
    if kind == "flava":
        return model.image_projection(image[:, 0]), model.text_projection(text[:, 0])
    if kind == "vlm2vec":  # the last real token
        masks = (side["attention_mask"].tolist() for side in inputs.values())
        at = ([max(n for n, real in enumerate(row) if real) for row in rows] for rows in masks)
        return [states[torch.arange(len(states)), places] for states, places in zip((image, text), at, strict=True)]
    towers = model.clip.towers
    if kind == "clip":
        pooled = towers.visual.ln_post(image[:, 0]) @ towers.visual.proj
        return pooled, text[torch.arange(len(ids)), ids.argmax(1)] @ towers.text_projection
    visual = towers.visual
    pooled = visual.ln_post(visual.attn_pool(image))[:, 0] @ visual.proj
    return pooled, towers.text.ln_final(text[:, -1]) @ towers.text.text_projection


@pytest.mark.parametrize("kind", ["mmgem", "clip", "coca", "flava", "vlm2vec"])
def test_features_are_what_clip_model_returns(kind, taken):
    """Its type and fields, as a tuple where asked, with gradients; but embeddings are unit vectors."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, theirs = {**sizes, "image_size": 16, "patch_size": 8}, {**sizes, "vocab_size": 9, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=theirs))
    wanted = {
        "images": clip.get_image_features(pixel_values=torch.zeros(1, 3, 16, 16)),
        "text": clip.get_text_features(input_ids=torch.tensor([[1, 2]])),
    }
    model, processor = (auto.from_pretrained(taken(kind)[0]) for auto in (AutoModel, AutoProcessor))
    calls = {"images": model.get_image_features, "text": model.get_text_features}
    inputs = {"images": processor(images=pictures(3)), "text": processor(text=TEXTS[:2])}
    found = {side: call(**inputs[side]) for side, call in calls.items()}
    by_hand_ = pooled_by_hand(kind, model, *(x.last_hidden_state for x in found.values()), inputs)
    for (side, out), pooled in zip(found.items(), by_hand_, strict=True):
        assert type(out) is type(wanted[side]) and list(out.keys()) == list(wanted[side].keys())
        assert torch.allclose(out.pooler_output, torch.nn.functional.normalize(pooled.float(), dim=-1), atol=2e-6)
        parts = calls[side](**inputs[side], return_dict=False)
        assert type(parts) is type(clip.get_text_features(torch.tensor([[1, 2]]), return_dict=False)) is tuple
        assert [torch.equal(*pair) for pair in zip(parts, out.values(), strict=True)] == [True, True]
        out.pooler_output[:, 0].sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
        model.zero_grad()
        with torch.no_grad():
            assert not calls[side](**inputs[side]).pooler_output.requires_grad


@pytest.mark.parametrize("kind", ["mmgem", "siglip", "coca", "flava", "vlm2vec"])
def test_what_was_taken_away_can_be_saved_again(kind, taken, tmp_path):
    model, processor = (auto.from_pretrained(taken(kind)[0]) for auto in (AutoModel, AutoProcessor))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reading = (auto.from_pretrained(str(tmp_path)) for auto in (AutoModel, AutoProcessor))
    shown = pictures(3)
    first, second = (
        m.eval().get_image_features(**p(images=shown)).pooler_output for m, p in ((model, processor), (again, reading))
    )
    assert torch.equal(first, second)
    first, second = (
        m.get_text_features(**p(text="a red cube")).pooler_output for m, p in ((model, processor), (again, reading))
    )
    assert torch.equal(first, second) and len(first) == 1


@pytest.mark.parametrize("kind", ["mmgem", "coca", *MAPPINGS])
def test_a_folder_writes_as_the_trained_model_does(kind, taken, tmp_path):
    """Saved again, too; a mapping takes its backbones along, and what it cannot do it says."""
    folder, _, family = taken(kind)
    shown = pictures()
    pixels = torch.stack([by_hand(picture, family.image) for picture in shown])
    wanted = family.tokenizer.batch_decode(family.model.eval().generate(pixels), skip_special_tokens=True)
    assert len(set(wanted)) > 1, "captions that differ make the comparison sharp"
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModel, AutoProcessor))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for where in (folder, tmp_path):
        model, processor = AutoModel.from_pretrained(where).eval(), AutoProcessor.from_pretrained(where)
        ids = model.generate(processor(images=shown)["pixel_values"])
        assert processor.batch_decode(ids, skip_special_tokens=True) == wanted
    if kind in MAPPINGS:
        for call in (model.get_image_features, model.get_text_features):
            with pytest.raises(UserError, match=r"mmgem\.mapping: .* embeds nothing"):
                call(pixels)


@pytest.mark.parametrize("kind", ["mmgem", "clip", "flava", "vlm2vec"])
def test_a_folder_in_bf16_embeds_nearly_the_same(kind, taken, tmp_path):
    folder, half = taken(kind)[0], tmp_path / "half"
    shutil.copytree(folder, half)
    cast(half, torch.bfloat16)
    found = []
    for where in (folder, half):
        model, processor = AutoModel.from_pretrained(where).eval(), AutoProcessor.from_pretrained(where)
        images = model.get_image_features(**processor(images=pictures(3))).pooler_output
        found.append(torch.cat([images, model.get_text_features(**processor(text=TEXTS[:2])).pooler_output]))
    assert found[1].dtype == torch.float32 and not torch.equal(*found)
    assert float((found[0] * found[1]).sum(1).min()) > 0.99


def test_a_folder_without_its_processor_says_so(taken, tmp_path):
    shutil.copytree(taken("mmgem")[0], tmp_path / "old")
    (tmp_path / "old" / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no processor_config.json; .*gemsmith export"):
        AutoProcessor.from_pretrained(tmp_path / "old")


def test_an_adapter_alone_has_its_processor_too(tmp_path):
    """It has no weights of its backbone, so that only peft opens it; what reads its inputs is there all the same."""
    config = parse([*RECIPE, *QWEN, *LORA, "--adapter.module", "backbone", "--adapter.merge", "false"])[0]
    family = build(config, tmp_path / "tokenizer", lambda: CAPTIONS)
    save(config, family, family.model.state_dict(), tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"adapter", "vlm2vec_processor.json", "processor_config.json"} <= names and "config.json" not in names


def by_hand(picture, spec):
    side, picture = spec.size, picture.convert("RGB")
    if spec.resize_mode == "shortest":
        scale = side / min(picture.size)
        w, h = (side if s == min(picture.size) else int(side * s / min(picture.size)) for s in picture.size)
        assert scale > 0
        picture = picture.resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - side) / 2), round((h - side) / 2)
        picture = picture.crop((left, top, left + side, top + side))
    else:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
