"""CoCa against open_clip's own model and CoCaLoss on one batch, its cached step against autograd, files both ways."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import UserError
from tests.conftest import gemsmith
from tests.training.conftest import COCA, coca_config
from tests.training.plain import differences, doubled, patched_float
from tests.training.step import cached_gradients, chunks_of
from training.config import ClipRecipe, ObjectiveConfig
from training.families import build
from training.inference import load
from training.models.clip import Clip, export, read_export
from training.models.clip_words import EOT, PAD, SOT, Words
from training.models.coca import Coca
from training.models.head import Head

WEIGHTS = {"embed": 1.0, "generate": 2.0}  # of the recipe, and the paper's


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return build(coca_config(), tmp_path_factory.mktemp("run") / "tokenizer", list)


def open_clips(model):
    """open_clip's own model with these weights, float64."""
    from open_clip.coca_model import CoCa

    theirs = CoCa(**{k: v for k, v in COCA.items() if k != "custom_text"}).double()
    theirs.load_state_dict(model.to_open_clip(model.state_dict()))
    return theirs


@pytest.mark.parametrize(("chunk", "retain"), [(1, 0), (3, 0), (3, 4), (12, 0), (12, 12)])
def test_value_and_gradients_are_open_clips(shards, family, chunk, retain):
    """CoCaLoss of the whole batch, with a hole taken out of it, in float64."""
    from open_clip.loss import CoCaLoss

    model = family.model.double()
    config = coca_config()
    chunks = [doubled(c) for c in chunks_of(shards, family, config, chunk, hole=5, retain=retain)]
    batch = {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
    theirs = open_clips(model)
    out = theirs(batch["pixel_values"][batch["valid"]], batch["input_ids"][batch["valid"]])
    names = ("image_features", "text_features", "logits", "labels", "logit_scale")
    contrastive, caption = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(*(out[n] for n in names))
    (contrastive + caption).backward()
    with patched_float():
        metrics, found = cached_gradients(model, chunks, config.objective, retain > 0)
    assert abs(float(metrics["loss"] - (contrastive + caption).detach())) < 1e-11
    assert abs(float(metrics["loss_embed"] - contrastive.detach())) < 1e-11
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    expected = model.from_open_clip(gradients)
    whole, worst = differences(found, expected)
    assert found.keys() == expected.keys() and whole < 1e-12 and worst < 1e-11, (whole, worst)


def test_whole_logits_are_never_made(shards, family):
    """No tensor of a chunk's step has an entry for each token and each word of the vocabulary."""
    model = family.model.float()
    (chunk,) = chunks_of(shards, family, coca_config(), 12)
    largest = 0

    def pack(x):
        nonlocal largest
        largest = max(largest, x.numel() if x.untyped_storage().data_ptr() not in held else 0)
        return x

    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(chunk, separable=True)["sums"]["generate"].backward()
    assert largest < 49408 * int(model.counts(chunk)["generate"]) / 4


def test_a_checkpoint_of_open_clips_comes_in_and_goes_out(tmp_path, family):
    """By the name of an architecture and a file of weights; every tensor comes back, and open_clip opens the export."""
    import open_clip

    torch.manual_seed(5)
    (tmp_path / "coca_small.json").write_text(json.dumps(COCA))
    open_clip.add_model_config(tmp_path / "coca_small.json")
    theirs = open_clip.create_model("coca_small")
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.2)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    recipe = ClipRecipe(arch="coca_small", pretrained=str(tmp_path / "weights.pt"))
    model = Clip.from_recipe(recipe, ObjectiveConfig(temperature=0.07)).eval()
    assert isinstance(model, Coca)
    preprocess = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    export(model, model.state_dict(), preprocess, tmp_path / "export")
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    state, original = opened.state_dict(), theirs.state_dict()
    assert state.keys() == original.keys()
    for name in original:
        same = torch.allclose if name == "logit_scale" else torch.equal
        assert same(state[name], original[name]), name
    again = read_export(model, tmp_path / "export")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[n], x) for n, x in model.state_dict().items())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(
        torch.nn.functional.normalize(model.image(pixels)[0], dim=-1), opened.eval().encode_image(pixels), atol=1e-6
    )
    local = Clip.from_recipe(ClipRecipe(arch=f"local-dir:{tmp_path / 'export'}"), ObjectiveConfig())
    assert torch.equal(local.towers.text_decoder.head.weight, model.towers.text_decoder.head.weight)


def test_captions_are_the_greedy_ones(family):
    """Token by token the likeliest of open_clip's own logits, and read back as text."""
    model = family.model.double().eval()
    theirs = open_clips(model).eval()
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = model.generate(pixels, max_new_tokens=6, min_new_tokens=2)
    for row in range(3):
        ids = [SOT]
        for number in range(found.shape[1]):
            if EOT in ids:
                assert found[row, number] == PAD
                continue
            logits = theirs(pixels[row : row + 1], torch.tensor([ids]), output_labels=False)["logits"][0, -1]
            logits[[PAD, SOT, *([EOT] if number < 2 else [])]] = -torch.inf
            ids.append(int(logits.argmax()))
            assert found[row, number] == ids[-1]
    with pytest.raises(UserError, match="greedy"):
        model.generate(pixels, num_beams=3)
    rounded = copy.deepcopy(model).bfloat16()
    given = [rounded.generate(pixels.to(dtype), max_new_tokens=6) for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(*given), "pictures come in fp32 whatever the weights are in, as from the processor"
    words = Words(context_length=14)
    texts = ["a dog chases two cats", "red"]
    assert [t.strip() for t in words.batch_decode(words(texts))] == texts


def test_a_caption_loss_needs_a_decoder():
    sizes = {k: v for k, v in COCA.items() if k != "multimodal_cfg"}
    with pytest.raises(UserError, match=r"objective\.weights: generate needs an architecture with a text decoder"):
        Clip.from_recipe(ClipRecipe(model_cfg=sizes), ObjectiveConfig(weights=WEIGHTS))
    with pytest.raises(UserError, match=r"clip\.arch: local-dir:/no/such"):
        Clip.from_recipe(ClipRecipe(arch="local-dir:/no/such"), ObjectiveConfig())


def test_a_run_exports_what_captions(shards, tmp_path):
    """The export and the checkpoint write the same captions, as evaluation asks for them."""
    run, sizes = tmp_path / "run", ["--clip.model_cfg", json.dumps(COCA)]
    recipe = [
        "--config",
        "recipes/train/tiny_coca.yaml",
        *sizes,
        "--loader.batch",
        "12",
        "--samples",
        "24",
        "--log_every",
        "1",
    ]
    gemsmith("train", *recipe, "--data", shards, "--out", run, "--ranks", 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss_generate"]) for line in lines)
    pictures = [Image.new("RGB", (40, 48), (40 * n, 90, 200)) for n in range(3)]
    said = []
    for folder in (run / "export", run / "checkpoints" / "step_00000002"):
        model = load(folder)
        assert model.can_caption
        said.append(model.caption(model.images(pictures), max_new_tokens=5))
        assert model.embed_images(model.images(pictures)).shape == model.embed_texts(["a", "b", "c"]).shape == (3, 16)
    assert said[0] == said[1] and len(said[0]) == 3 and all(isinstance(text, str) for text in said[0])


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_adapters_leave_the_output_head_alone(kind, tmp_path):
    model = build(coca_config("--adapter", f"{{kind: {kind}, module: towers}}"), tmp_path / "tokenizer", list).model
    adapted = [name for name, module in model.named_modules() if hasattr(module, f"{kind}_dropout")]
    assert type(model.towers.text_decoder.head) is Head
    assert any("text_decoder" in name for name in adapted) and any("visual" in name for name in adapted)
