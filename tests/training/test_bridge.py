"""LiMBeR and MAPL, and towers from an export: only the mapping changes and learns, chunks change no gradient."""

import json
import shutil

import open_clip
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from curation.errors import UserError
from tests.training.bridges import CAPTIONS, COLOURS, MAPPINGS, bridge_config
from tests.training.plain import differences, patched_float
from training.distributed import World
from training.families import build
from training.family_config import MappingConfig, MMGemRecipe, VisionConfig
from training.gradient_cache import Outputs, gradient_cached_step
from training.look import look_of
from training.models.bridge import Bridge
from training.models.vision import from_export
from training.objectives.infonce import InfoNCE
from training.optim import parameter_groups
from training.train import parse


def made(backbones, tmp_path, name):
    config = bridge_config(backbones, name, "--loader.batch", "12")
    torch.manual_seed(1)
    return config, build(config, tmp_path / "tokenizer", list)


def batch_of(family, n, shuffled=False):
    numbers = torch.arange(n) % len(CAPTIONS)
    noise = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    pixels = torch.tensor(list(COLOURS.values()))[numbers][:, :, None, None] + 0.1 * noise
    text = family.encode_text([CAPTIONS[i] for i in numbers.roll(1 if shuffled else 0).tolist()])
    return {
        "pixel_values": pixels.to(next(family.model.parameters()).dtype),
        **text,
        "valid": torch.ones(n, dtype=torch.bool),
    }


def step(model, chunks):
    return gradient_cached_step(
        forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
        backward=lambda loss: loss.backward(),
        chunks=chunks,
        counts={"generate": sum(model.counts(c)["generate"] for c in chunks)},
        weights={},
        coupled=InfoNCE(),
        world=World(),
    )


@pytest.mark.parametrize("name", MAPPINGS)
def test_only_the_mapping_changes_and_captions_learn_the_pictures(backbones, tmp_path, name):
    config, family = made(backbones, tmp_path, name)
    model = family.model
    groups = parameter_groups(model.named_parameters(), config.optim)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if n.startswith("mapping.")}
    before = {n: x.clone() for n, x in model.state_dict().items()}
    batch, wrong = batch_of(family, 6), batch_of(family, 6, shuffled=True)
    optimizer = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], lr=1e-2)
    for _ in range(300):
        loss = float(step(model, [batch])["loss_generate"])
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        shuffled = float(model(wrong, True)["sums"]["generate"] / model.counts(wrong)["generate"])
    assert loss < 0.2 * shuffled, (loss, shuffled)
    after = model.state_dict()
    assert all(torch.equal(after[n], x) for n, x in before.items() if not n.startswith("mapping."))
    assert not any(torch.equal(after[n], before[n]) for n in trains if not n.endswith("in_proj_bias"))
    written = family.tokenizer.batch_decode(model.eval().generate(batch["pixel_values"]), skip_special_tokens=True)
    assert sum(text.strip() == caption for text, caption in zip(written, CAPTIONS)) >= 5, written

    family.export(model.state_dict(), tmp_path / "export")
    again = Bridge.from_pretrained(tmp_path / "export").eval()
    assert torch.equal(again.generate(batch["pixel_values"]), model.generate(batch["pixel_values"]))
    lm = json.loads((backbones / "lm" / "config.json").read_text())
    assert again.llm.config.vocab_size == lm["vocab_size"], "a frozen LM gets no new words"
    for call in (again.get_image_features, again.get_text_features):
        with pytest.raises(UserError, match=r"mmgem\.mapping: .* embeds nothing"):
            call(batch["pixel_values"])


@pytest.mark.parametrize("name", MAPPINGS)
def test_float64_equals_the_full_batch_written_plainly(backbones, tmp_path, name):
    """One forward of the LM's own over visual tokens and caption, its own whole logits, and a hole left out."""
    config, family = made(backbones, tmp_path, name)
    model = family.model.double()
    parameter_groups(model.named_parameters(), config.optim)
    batch = batch_of(family, 7)
    batch["valid"][2] = False
    visual = model._visual(batch["pixel_values"])
    assert visual.shape[:2] == (7, {"limber": 4, "mapl": 3}[name])
    words = model.llm.get_input_embeddings()(batch["input_ids"])
    logits = model.llm(inputs_embeds=torch.cat([visual, words], 1)).logits[:, visual.shape[1] - 1 : -1]
    keep = batch["valid"]
    expected_loss = F.cross_entropy(logits[keep].flatten(0, 1), batch["labels"][keep].flatten())
    expected_loss.backward()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.grad.clone() for n, p in own.items()}
    for chunk in (1, 3, 7):
        model.zero_grad()
        with patched_float():
            metrics = step(model, [dict(zip(batch, part)) for part in zip(*(x.split(chunk) for x in batch.values()))])
        whole, worst = differences({n: p.grad for n, p in own.items()}, expected)
        assert whole < 1e-12 and worst < 1e-11, (chunk, whole, worst)
        assert abs(float(metrics["loss"] - expected_loss.detach())) < 1e-12 and "loss_embed" not in metrics


@pytest.mark.parametrize(("name", "k"), [("limber", 4), ("mapl", 3)])
def test_a_caption_has_the_positions_that_the_visual_tokens_leave(backbones, tmp_path, name, k):
    """Of a GPT-2, whose positions are the rows of a table."""
    vocabulary = json.loads((backbones / "lm" / "config.json").read_text())["vocab_size"]
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=20, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "lm"
    )
    most = 20 - k + 1  # of the caption and </s>: the last visual token stands where its first word comes from

    def family(tokens):
        more = ("--mmgem.language.name_or_path", str(tmp_path / "lm"), "--loader.max_tokens", str(tokens))
        return build(bridge_config(backbones, name, *more), tmp_path / "tokenizer", list)

    def loss(tokens):
        text = made.encode_text([" ".join(CAPTIONS)], tokens)
        assert text["input_ids"].shape == (1, tokens)
        chunk = {"pixel_values": torch.zeros(1, 3, 32, 32), **text, "valid": torch.ones(1, dtype=torch.bool)}
        return made.model(chunk, separable=True)["sums"]["generate"]

    made = family(most)
    assert loss(most).isfinite()
    with pytest.raises(IndexError):
        loss(most + 1)
    named = rf"^loader\.max_tokens: {most + 1} is more than the {most} positions of the LLM beside {k} visual tokens"
    with pytest.raises(UserError, match=named):
        family(most + 1)


def test_mmgem_begins_from_a_clip_that_was_trained_here(backbones, tmp_path):
    arguments = ["--config", "recipes/train/tiny_mmgem.yaml", "--data", ".", "--out", "."]
    config = parse([*arguments, "--mmgem.vision.arch", f"local-dir:{backbones / 'clip'}"])[0]
    family = build(config, tmp_path / "tokenizer", lambda: CAPTIONS)
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{backbones / 'clip'}")
    clip.visual.proj, clip.visual.output_tokens = None, True
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(family.model.eval().feature_map(pixels), clip.eval().visual(pixels)[1])
    assert family.image.size == 32, "the export's sizes, not the recipe's"


def test_bad_mappings_and_towers_are_one_line(backbones, tmp_path):
    with pytest.raises(UserError, match=r"mmgem\.mapping\.heads: 3 does not divide width 16"):
        MappingConfig(width=16, heads=3)
    with pytest.raises(UserError, match=r"mmgem\.mapping\.tokens: 0"):
        MappingConfig(tokens=0)
    with pytest.raises(UserError, match=r"mmgem\.vision\.arch: .* is no export of a CLIP"):
        from_export(tmp_path, VisionConfig())
    file = shutil.copytree(backbones / "clip", tmp_path / "clip") / "open_clip_config.json"
    record = json.loads(file.read_text())
    resnet = {**record["model_cfg"]["vision_cfg"], "layers": [1, 1, 1, 1]}
    file.write_text(json.dumps({**record, "model_cfg": {**record["model_cfg"], "vision_cfg": resnet}}))
    with pytest.raises(UserError, match=r"mmgem\.vision\.arch: .* no plain ViT"):
        from_export(file.parent, VisionConfig())
    file.write_text(json.dumps({**record, "preprocess_cfg": {"resize_mode": "shortest"}}))
    with pytest.raises(UserError, match=r"loader\.resize_mode: .* was trained with shortest"):
        look_of(f"local-dir:{file.parent}", None, "squash", "mmgem.vision.arch")
    with pytest.raises(UserError, match=r"mmgem\.mapping: takes no run to begin from"):
        MMGemRecipe(mapping=MappingConfig(), prompts=4)
