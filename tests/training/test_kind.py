"""A folder of another kind, code that nobody asked for, a tokenizer that lacks a token: one line, before any weight."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    FlavaModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)
from transformers import FlavaConfig as TheirFlavaConfig

from curation.errors import UserError
from curation.manifest import write_manifest
from curation.signals.clip import Clip as ClipSignal
from tests.training.bridges import bridge_config
from tests.training.conftest import clip_config, coca_config, flava_config, tiny_config, vlm2vec_config
from training import begin
from training.auto import AutoModel
from training.config import ObjectiveConfig, as_dict
from training.export import save
from training.families import build
from training.family_config import (
    ClipRecipe,
    CodebookConfig,
    LanguageConfig,
    TokenizerConfig,
    VisionConfig,
    Vlm2VecRecipe,
)
from training.inference import load
from training.look import look_of
from training.models.bridge import Bridge
from training.models.clip import Clip
from training.models.clip_export import OpenClip
from training.models.clip_words import words_of
from training.models.codebook import load_codebook
from training.models.flava import Flava
from training.models.mmgem import MMGem
from training.models.vision import pretrained_tower
from training.models.vlm2vec import Vlm2Vec, Vlm2VecConfig, recipe_processor
from training.tokenizer import load_tokenizer, train_bpe

CAPTIONS = ["a red cube", "two green cones behind a table"]


KINDS = {"mmgem": "mmgem", "flava": "gemsmith_flava", "coca": "gemsmith_open_clip", "limber": "mmgem_bridge"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, backbones):
    """An export of each, by name."""
    found = {}
    configs = {"mmgem": tiny_config(), "flava": flava_config(), "coca": coca_config()}
    for name, config in (configs | {"limber": bridge_config(backbones, "limber")}).items():
        where = tmp_path_factory.mktemp(name)
        family = build(config, where / "tokenizer", lambda: CAPTIONS)
        save(config, family, family.model.state_dict(), where / "export")
        write_manifest(where / "export" / "gemsmith.json", {"steps": 0, "samples": 0, "config": as_dict(config)})
        found[name] = where / "export"
    return found


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        *((MMGem, folder) for folder in ("flava", "coca", "limber")),
        *((kind, "mmgem") for kind in (Flava, Vlm2Vec, OpenClip, Bridge)),
        *((Vlm2Vec, "flava"), (OpenClip, "limber"), (Bridge, "coca")),
    ],
)
def test_a_folder_of_another_family_is_refused(kind, folder, folders):
    with pytest.raises(UserError, match=rf"{kind.__name__}.from_pretrained: .* holds a '{KINDS[folder]}'") as refused:
        kind.from_pretrained(folders[folder])
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="holds no model"):
        kind.from_pretrained(folders[folder].parent)


def test_recipes_that_name_a_folder_of_another_family(folders, tmp_path):
    """Each field says what it wanted, before any weight is read."""
    mmgem, flava = folders["mmgem"], folders["flava"]
    tokenizer = train_bpe(CAPTIONS, 300)
    tower = VisionConfig(arch=f"local-dir:{flava}")
    for opening, named in [
        (lambda: OpenClip.from_pretrained(mmgem), r"OpenClip\.from_pretrained: .* holds a 'mmgem'"),
        (lambda: Bridge.from_pretrained(mmgem), r"Bridge\.from_pretrained: .* holds a 'mmgem', not a 'mmgem_bridge'"),
        (
            lambda: Clip.from_recipe(ClipRecipe(arch=f"local-dir:{mmgem}"), ObjectiveConfig()),
            r"clip\.arch: local-dir:.*open_clip_config\.json",
        ),
        (lambda: look_of(tower.arch, None, None, "mmgem.vision.arch"), r"local-dir:.* cannot be read"),
        (
            lambda: MMGem.from_backbones(tower, LanguageConfig(), tokenizer),
            r"mmgem\.vision\.arch: .* is no export of a CLIP",
        ),
        (
            lambda: recipe_processor(Vlm2VecRecipe(name_or_path=str(mmgem)), None, list),
            r"vlm2vec\.name_or_path: .*mmgem",
        ),
    ]:
        with pytest.raises(UserError, match=named) as refused:
            opening()
        assert "\n" not in str(refused.value)


def test_a_clip_opens_by_its_name_on_the_hub_and_says_what_it_does_not_know(folders, tmp_path):
    """Out of the hub's own cache, without a network; by AutoModel, too."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--clip"
    shutil.copytree(folders["coca"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    wanted = OpenClip.from_pretrained(folders["coca"]).state_dict()
    for opening in (OpenClip.from_pretrained, AutoModel.from_pretrained):
        found = opening("org/clip", **hub)
        assert isinstance(found, OpenClip) and all(torch.equal(x, wanted[n]) for n, x in found.state_dict().items())
        for dtype in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
            assert {p.dtype for p in opening(folders["coca"], **dtype).parameters()} == {torch.bfloat16}
        with pytest.raises(UserError, match=r"^OpenClip\.from_pretrained: device_map is not known here"):
            opening(folders["coca"], device_map="cpu")
    (tmp_path / "bare").mkdir()
    shutil.copy(folders["coca"] / "config.json", tmp_path / "bare")
    for name in ("org/none", str(tmp_path / "bare"), str(tmp_path / "absent" / "folder")):
        with pytest.raises(
            UserError, match=r"^OpenClip\.from_pretrained: .* cannot be read .*; name a CLIP's"
        ) as refused:
            OpenClip.from_pretrained(name, **hub)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [clip_config, coca_config])
@pytest.mark.parametrize(
    ("section", "typo", "named"),
    [
        ("vision_cfg", {"imagesize": 64}, r"unexpected keyword argument 'imagesize'"),
        ("text_cfg", {"head": 2}, r"unexpected keyword argument 'head'"),
        (None, {"embed": 16}, r"unexpected keyword argument 'embed'"),
    ],
)
def test_sizes_that_open_clip_does_not_know_are_one_line(config, section, typo, named):
    model_cfg = json.loads(json.dumps(config().clip.model_cfg))
    (model_cfg[section] if section else model_cfg).update(typo)
    with pytest.raises(UserError, match=rf"^clip\.model_cfg: open_clip cannot build it .*{named}") as refused:
        Clip.from_recipe(ClipRecipe(model_cfg=model_cfg), ObjectiveConfig(weights={}))
    assert "\n" not in str(refused.value)


def test_stage_2_begins_from_its_own_family(folders):
    write_manifest(folders["flava"] / "gemsmith.json", {"config": as_dict(flava_config()), "steps": 1})
    with pytest.raises(UserError, match=r"mmgem\.init: .* is a checkpoint of flava; name one of mmgem"):
        tiny_config("--mmgem.init", str(folders["flava"]))


def test_the_own_folder_opens(folders):
    opened = MMGem.from_pretrained(folders["mmgem"])
    assert torch.equal(opened.h1.weight, MMGem.from_pretrained(str(folders["mmgem"])).h1.weight)
    for kind, folder in ((Flava, "flava"), (OpenClip, "coca"), (Bridge, "limber")):
        assert isinstance(kind.from_pretrained(folders[folder]), kind)


@pytest.mark.parametrize("kind", [MMGem, Flava, OpenClip, Bridge])
def test_an_export_that_is_cut_short_is_one_line(kind, folders, tmp_path):
    """Its weights, whose reader raises no OSError, and its config."""
    names = {MMGem: "mmgem", Flava: "flava", OpenClip: "coca", Bridge: "limber"}
    folder = shutil.copytree(folders[names[kind]], tmp_path / "export")
    (weights,) = folder.glob("*.safetensors")
    for opening in (kind.from_pretrained, load):
        for size in (weights.stat().st_size - 8, 4):
            os.truncate(weights, size)
            with pytest.raises(UserError, match=rf": .*{weights.name} cannot be read .*write it again") as refused:
                opening(folder)
            assert "\n" not in str(refused.value)
        shutil.copy(folders[names[kind]] / weights.name, weights)
    config = folder / ("open_clip_config.json" if kind is OpenClip else "config.json")
    os.truncate(config, 40)
    with pytest.raises(UserError, match=rf"--checkpoint: .*{config.name} cannot be read .*write it again") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_a_backbone_that_is_cut_short_is_one_line(backbones, tmp_path):
    tower, lm = (shutil.copytree(backbones / name, tmp_path / name) for name in ("clip", "lm"))
    for file in (tower / "open_clip_model.safetensors", lm / "model.safetensors"):
        os.truncate(file, file.stat().st_size - 8)
    for opening, named in [
        (lambda: pretrained_tower(VisionConfig(arch=f"local-dir:{tower}")), r"mmgem\.vision\.arch: .*safetensors"),
        (lambda: language(lm), r"mmgem\.language\.name_or_path: .*lm cannot be read"),
    ]:
        with pytest.raises(UserError, match=named) as refused:
            opening()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("folder", "named"), [("coca", "is a checkpoint of clip"), ("limber", "mapping between backbones")]
)
def test_a_run_of_mmgem_begins_from_one_of_mmgem(folder, named, folders):
    with pytest.raises(UserError, match=rf"mmgem\.init: .*{named}") as refused:
        begin.resolved(tiny_config("--mmgem.init", str(folders[folder])))
    assert "\n" not in str(refused.value)


def test_a_tower_that_pools_for_a_decoder_is_none_of_mmgem(folders):
    with pytest.raises(UserError, match=r"mmgem\.vision\.arch: .* no plain ViT"):
        pretrained_tower(VisionConfig(arch=f"local-dir:{folders['coca']}"))


@pytest.mark.parametrize("words", ["its own", "nothing", "an empty one"])
def test_a_named_language_model_brings_its_own_words(words, backbones, tmp_path):
    """A vocabulary trained on the captions would give it ids that mean other words to it."""
    lm = shutil.copytree(backbones / "lm", tmp_path / "lm")
    if words != "its own":
        for file in lm.glob("*token*"):
            file.unlink()
    if words == "an empty one":  # transformers makes GPT-2's and Gemma's of no file at all
        (lm / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    config = tiny_config("--mmgem.language.name_or_path", str(lm))
    if words == "its own":
        tokenizer = build(config, tmp_path / "tokenizer", lambda: CAPTIONS).tokenizer
        theirs = AutoTokenizer.from_pretrained(lm)
        assert tokenizer(CAPTIONS)["input_ids"] == theirs(CAPTIONS)["input_ids"]
        assert train_bpe(CAPTIONS, 320).get_vocab() != theirs.get_vocab()
        return
    with pytest.raises(UserError, match=r"mmgem\.tokenizer\.name_or_path: .*lm .*; name ") as refused:
        build(config, tmp_path / "tokenizer", lambda: CAPTIONS)
    assert "\n" not in str(refused.value)


def language(name):
    tokenizer = train_bpe(CAPTIONS, 300)
    return MMGem.from_backbones(tiny_config().mmgem.vision, LanguageConfig(name_or_path=str(name)), tokenizer)


def test_a_language_model_that_is_none(folders, tmp_path):
    for folder in (*(folders[name] for name in ("flava", "coca", "limber")), tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"mmgem.language.name_or_path: .* cannot be read") as refused:
            language(folder)
        assert "\n" not in str(refused.value)


def without(folder, to, *names):
    """A copy of a saved model whose file lacks some weights."""
    shutil.copytree(folder, to)
    tensors = {n: x for n, x in load_file(to / "model.safetensors").items() if n not in names}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_folder_that_lacks_weights_is_refused(folders, tmp_path):
    """transformers draws them at random, with a warning."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "decoder")
    GPT2Model(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "tied")
    layer = {**sizes, "num_hidden_layers": 1}
    parts = {"image_config": {**layer, "image_size": 32}, "text_config": layer, "multimodal_config": layer}
    encoders = TheirFlavaConfig(**parts, hidden_size=32, projection_dim=16, init_codebook=False)
    FlavaModel(encoders).save_pretrained(tmp_path / "encoders")
    codebook = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, num_blocks_per_group=1, vocab_size=32))
    codebook.save_pretrained(tmp_path / "whole")
    codes = without(tmp_path / "whole", tmp_path / "codes", "blocks.output.conv.bias")
    for opening, named in [
        (
            lambda: language(tmp_path / "decoder"),
            r"mmgem\.language\.name_or_path: .* LlamaForCausalLM \(lm_head\.weight\)",
        ),
        (lambda: Flava._load_published(None, str(tmp_path / "encoders")), r"flava\.name_or_path: .* and \d+ more\)"),
        (
            lambda: load_codebook(CodebookConfig(name_or_path=str(codes), vocab_size=32), tmp_path, iter(())),
            r"flava\.codebook\.name_or_path: .*\(blocks\.output\.conv\.bias\)",
        ),
    ]:
        with pytest.raises(UserError, match=named) as refused:
            opening()
        assert "\n" not in str(refused.value)
    assert language(tmp_path / "tied").llm.get_output_embeddings().weight is not None
    for kind, name, lost in [
        (MMGem, "mmgem", "h2.weight"),
        (Flava, "flava", "log_scale"),
        (Bridge, "limber", "mapping.bias"),
    ]:
        folder = without(folders[name], tmp_path / name, lost)
        for opening in (kind.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(UserError, match=rf"from_pretrained: .* lacks weights .* \({lost}\)"):
                opening(folder)
        model, info = kind.from_pretrained(folders[name], output_loading_info=True)
        assert isinstance(model, kind) and not info["missing_keys"]


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """(a folder whose config, model and tokenizer are code of its own, the file that this code writes)"""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Words", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "brought_along", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Words", "auto_map": auto}))
    (folder / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Words: pass"
    )
    return folder, ran


def test_code_that_a_folder_brings_is_not_run(brought):
    folder, ran = brought
    with pytest.raises(UserError, match=r"mmgem.language.name_or_path: .* brings code of its own"):
        language(folder)
    with pytest.raises(UserError, match=r"mmgem.tokenizer.name_or_path: .* brings code of its own"):
        load_tokenizer(TokenizerConfig(name_or_path=str(folder)), list)
    with pytest.raises(UserError, match=r"clip: the tokenizer .* cannot be read"):
        words_of({"hf_tokenizer_name": str(folder)})
    assert not ran.exists()


def test_a_folder_cannot_say_itself_that_its_code_may_run(brought, tmp_path, backbones):
    """Whatever its files say of trust: only who opens it does."""
    folder, ran = brought
    text_cfg = {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": True}}
    with pytest.raises(UserError, match=r"clip: the tokenizer .* cannot be read"):
        words_of(text_cfg)

    scorer = shutil.copytree(backbones / "clip", tmp_path / "clip")
    shutil.copytree(folder, scorer, dirs_exist_ok=True)
    record = json.loads((scorer / "open_clip_config.json").read_text())
    record["model_cfg"]["text_cfg"] |= text_cfg
    (scorer / "open_clip_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"cannot load the weights .*contains custom code"):
        ClipSignal(model=str(scorer)).load("clip_score")

    export = tmp_path / "export"
    export.mkdir()
    says = {"model_type": "vlm2vec", "backbone_name": str(folder), "trust_remote_code": True}
    (export / "config.json").write_text(json.dumps(says))
    save_file({"scale": torch.zeros(1)}, export / "model.safetensors", metadata={"format": "pt"})
    recipe = as_dict(vlm2vec_config())
    recipe["vlm2vec"] |= {"backbone": None, "name_or_path": str(folder), "trust_remote_code": True}
    write_manifest(export / "gemsmith.json", {"steps": 0, "samples": 0, "config": recipe})
    assert not Vlm2VecConfig.from_pretrained(export).trust_remote_code
    for opening in (AutoModel.from_pretrained, Vlm2Vec.from_pretrained, load):
        with pytest.raises(UserError, match=r"brings code of its own; .*--trust-remote-code") as refused:
            opening(export)
        assert "\n" not in str(refused.value) and not ran.exists()
    for opening in (AutoModel.from_pretrained, load):
        with pytest.raises(Exception, match="Config"):  # which is no config
            opening(export, trust_remote_code=True)
        assert ran.exists(), "with consent it runs"
        ran.unlink()
        for module in [name for name in sys.modules if name.startswith("transformers_modules.")]:
            del sys.modules[module]


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = train_bpe(CAPTIONS, 300)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path / "words"))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(TokenizerConfig(name_or_path=str(tmp_path / "words")), list)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(str(tmp_path / "ends"))
    found = load_tokenizer(TokenizerConfig(name_or_path=str(tmp_path / "ends")), list)
    assert found.pad_token == "</s>", "what has an end and no padding pads with its end"


def test_a_tokenizer_of_more_words_than_the_model(tmp_path):
    for part, config in (("text_cfg", clip_config), ("multimodal_cfg", coca_config)):
        sizes = json.loads(json.dumps(config().clip.model_cfg))
        sizes[part]["vocab_size"] = 1000
        with pytest.raises(UserError, match=rf"clip\.model_cfg\.{part}\.vocab_size: .* 49408 words.*1000; write 49408"):
            build(config("--clip.model_cfg", json.dumps(sizes)), tmp_path / "none", list)
    family = build(vlm2vec_config(), tmp_path / "words", lambda: CAPTIONS)
    family.model.backbone.save_pretrained(tmp_path / "vlm")
    family.tokenizer.tokenizer.add_tokens([f"<more_{n}>" for n in range(9)])
    family.tokenizer.save_pretrained(str(tmp_path / "more"))
    named = ["--vlm2vec.name_or_path", str(tmp_path / "vlm"), "--vlm2vec.backbone", "null"]
    with pytest.raises(UserError, match=r"vlm2vec\.processor: the tokenizer has \d+ words"):
        build(vlm2vec_config(*named, "--vlm2vec.processor", str(tmp_path / "more")), tmp_path / "again", list)
