"""MM-GEM on a pretrained causal LM and an OpenCLIP tower: new words, tied heads, spare rows, precision, statistics."""

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from curation.errors import UserError
from curation.manifest import write_manifest
from tests.training.plain import assert_a_plain_step
from tests.training.stage2 import stage2_config
from tests.training.test_gradient_cache import chunks_of, launched
from tests.training.test_taken_away import pictures
from training.config import ObjectiveConfig, as_dict
from training.export import save
from training.families import build
from training.inference import load
from training.models.clip import Clip, export
from training.models.mmgem import MMGem
from training.partitioned import Deferred
from training.tokenizer import CAP, EMB
from training.train import parse

CAPTIONS = ["a red cube left of a blue ball", "two green cones behind a table", "an oak table"]
SPARE = 64
"""Rows that a padded vocabulary has beyond its tokenizer's words."""
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LMS = {
    "llama": lambda n: LlamaConfig(vocab_size=n, tie_word_embeddings=False, **LLAMA),
    "llama_padded": lambda n: LlamaConfig(vocab_size=n + SPARE, tie_word_embeddings=False, **LLAMA),
    "gpt2": lambda n: GPT2Config(vocab_size=n, **GPT2),
    "gpt2_padded": lambda n: GPT2Config(vocab_size=n + SPARE, **GPT2),
    "gemma2": lambda n: Gemma2Config(
        vocab_size=n, **LLAMA, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0
    ),
}
TIED = ("gpt2", "gpt2_padded", "gemma2")
KINDS = pytest.mark.parametrize("kind", LMS)
LOOK = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}


def published_tokenizer():
    """As Llama's and GPT-2's are: no padding token, no words of ours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders as their libraries write them: causal LMs in bf16, as most are published, and a CLIP."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    tokenizer = published_tokenizer()
    for name, config in LMS.items():
        model = AutoModelForCausalLM.from_config(config(len(tokenizer)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        model.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    clip = Clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, ObjectiveConfig())
    export(clip, clip.state_dict(), {"size": [32, 32], **LOOK}, folder / "clip")
    return folder


def named(backbones, kind):
    lm = str(backbones / kind)
    words = ["--mmgem.vision.arch", f"local-dir:{backbones / 'clip'}", "--mmgem.language.name_or_path", lm]
    return [*words, "--mmgem.tokenizer.name_or_path", lm, "--loader.max_tokens", "24", "--precision", "fp32"]


def made(backbones, kind, folder, *more):
    words = ["--config", "recipes/train/tiny_mmgem.yaml", "--data", ".", "--out", ".", "--mmgem.embed_dim", "24"]
    config = parse([*words, *named(backbones, kind), "--loader.batch", "32", "--loader.chunk", "8", *more])[0]
    return config, build(config, folder / "RUN" / "tokenizer", list)


@KINDS
def test_new_words_join_and_all_else_stays(backbones, kind, tmp_path):
    _, family = made(backbones, kind, tmp_path)
    model, tokenizer = family.model, family.tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(backbones / kind, dtype=torch.float32).eval()
    words, before = model.llm.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    assert len(words) == max(len(tokenizer), len(before)) == model.llm.config.vocab_size
    assert torch.equal(words[: len(before)], before) and all(p.dtype == torch.float32 for p in model.parameters())
    new = tokenizer.convert_tokens_to_ids([EMB, CAP])
    assert new == [len(tokenizer) - 2, len(tokenizer) - 1] and not torch.equal(words[new[0]], words[new[1]])
    head = model.llm.get_output_embeddings().weight
    assert (head is words) == (theirs.get_output_embeddings().weight is before) == (kind in TIED)
    text = family.encode_text(CAPTIONS)
    chunk = {"pixel_values": torch.randn(3, 3, 32, 32), **text, "valid": torch.ones(3, dtype=torch.bool)}
    with torch.no_grad():
        first, second = (model.train()(chunk, separable=True) for _ in range(2))
        states = theirs.base_model(input_ids=text["input_ids"][:1, : text["length"][0]]).last_hidden_state
        ours = model.llm.base_model(input_ids=text["input_ids"][:1, : text["length"][0]]).last_hidden_state
    assert torch.equal(first["right"], second["right"]), "nothing is dropped while it trains"
    assert torch.equal(first["sums"]["generate"], second["sums"]["generate"])
    assert torch.allclose(ours, states, atol=1e-6)


@KINDS
def test_exported_and_opened_again_it_is_the_same_to_the_bit(backbones, kind, tmp_path):
    config, family = made(backbones, kind, tmp_path)
    folder = tmp_path / "RUN" / "export"
    state = {name: x.clone() for name, x in family.model.state_dict().items()}
    save(config, family, family.model.state_dict(), folder)
    write_manifest(folder / "gemsmith.json", {"steps": 1, "samples": 32, "config": as_dict(config)})
    pixels = torch.randn(2, 3, 32, 32)
    written = family.model.eval().generate(pixels, max_new_tokens=5)
    for again in (MMGem.from_pretrained(folder).eval(), load(folder).family.model):
        found = again.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[n], x) for n, x in state.items())
        tied = again.llm.get_output_embeddings().weight is again.llm.get_input_embeddings().weight
        assert tied == (kind in TIED)
        assert torch.equal(again.generate(pixels, max_new_tokens=5), written)


@KINDS
def test_built_in_parts_it_begins_from_the_same_bits(backbones, kind, tmp_path):
    """As ZeRO-3 builds it: every parameter made again alone is the whole build's."""
    _, whole = made(backbones, kind, tmp_path)
    with (deferred := Deferred()):
        _, parts = made(backbones, kind, tmp_path)
        wanted = dict(whole.model.named_parameters())
        for name, parameter in parts.model.named_parameters():
            with deferred.values(parameter):
                assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_soft_prompts_begin_as_the_llm_embeds_cap(backbones, kind, tmp_path):
    """Gemma's kind multiplies what its table holds."""
    config, family = made(backbones, kind, tmp_path)
    folder = tmp_path / "RUN" / "export"
    save(config, family, family.model.state_dict(), folder)
    write_manifest(folder / "gemsmith.json", {"steps": 1, "samples": 32, "config": as_dict(config)})
    second = build(stage2_config("captioning", folder), tmp_path / "second", list)
    second.prepare([])
    pooled = torch.randn(2, 24)
    with torch.no_grad():
        before, after = (model.caption_prompt(pooled) for model in (family.model, second.model))
    assert torch.equal(after[:, 0], before[:, 0]) and torch.equal(after[:, 1:], before[:, 1:].expand(-1, 5, -1))


def test_pictures_are_seen_as_the_tower_saw_them(backbones, tmp_path):
    config, family = made(backbones, "llama", tmp_path)
    spec = family.image
    assert (
        (list(spec.mean), list(spec.std))
        == (LOOK["mean"], LOOK["std"])
        == (
            family.model.config.image_mean,
            family.model.config.image_std,
        )
    )
    save(config, family, family.model.state_dict(), tmp_path / "RUN" / "export")
    write_manifest(
        tmp_path / "RUN" / "export" / "gemsmith.json", {"steps": 1, "samples": 32, "config": as_dict(config)}
    )
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{backbones / 'clip'}")
    shown = [picture.convert("RGB") for picture in pictures(4)]
    graded = load(tmp_path / "RUN" / "export")
    assert torch.equal(graded.images(shown), torch.stack([transform(picture) for picture in shown]))
    assert graded.preprocess["resize_mode"] == "shortest" and graded.preprocess["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt2_padded", "llm.transformer.wte.weight"),
        pytest.param("gemma2", "llm.model.embed_tokens.weight", marks=pytest.mark.long),  # its logits are capped
    ],
)
def test_a_tied_head_keeps_its_gradient_on_two_ranks(backbones, shards, tmp_path, kind, words):
    """ZeRO-3 cuts the shared matrix up once; both of its uses are in its gradient: 1e-6 in float32."""
    run = tmp_path / "RUN"
    saved, _ = launched(shards, run, "3", "mmgem", *named(backbones, kind))
    config, family = made(backbones, kind, tmp_path)
    expected = assert_a_plain_step(saved, family.model, chunks_of(shards, family, config, 32), config.objective)
    assert words in expected and "llm.lm_head.weight" not in expected


def test_a_text_beyond_the_llms_positions_is_one_line(backbones, tmp_path):
    with pytest.raises(UserError, match=r"loader\.max_tokens: 64 is more than the 63 positions of the LLM"):
        made(backbones, "gpt2", tmp_path, "--loader.max_tokens", "64")
