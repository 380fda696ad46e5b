"""SigLIP architectures and how models see pictures, against open_clip itself: forward, tokens, transforms, files."""

import io
import json
import tarfile

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD, OPENAI_DATASET_MEAN
from open_clip.transform import image_transform
from timm.models.vision_transformer import _create_vision_transformer

from curation.errors import UserError
from curation.manifest import write_manifest
from curation.preprocess import preprocess_of
from curation.signals.clip import Clip as ClipSignal
from tests.training.plain import differences, doubled, patched_float, plain_gradients, whole_batch
from tests.training.step import cached_gradients, chunks_of
from tests.training.test_data_images import encoded, photograph
from tests.training.test_taken_away import TEXTS, pictures
from training.auto import AutoModel, AutoProcessor
from training.config import LoaderConfig, ObjectiveConfig, as_dict
from training.data import ImageSpec, Loader, Shards
from training.export import save
from training.families import build
from training.family_config import ClipRecipe
from training.inference import load
from training.look import look_of
from training.models.clip import Clip
from training.models.patches import grid_of, only, take_over
from training.models.vision import vision_tower
from training.partitioned import Deferred
from training.train import parse

SMALL = "vit_small_test_siglip"


@timm.models.register_model
def vit_small_test_siglip(pretrained=False, **settings):
    """timm's `vit_base_patch16_siglip_224` in small: no class token, attention pooling."""
    sizes = {"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224",
        pretrained=False,
        **{**sizes, "class_token": False, "global_pool": "map", **settings},
    )


def sentencepiece(folder):
    """A T5 tokenizer, SigLIP's class, of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import T5TokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text.lower() for text in TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`ViT-B-16-SigLIP` as open_clip has it, with small sizes: its folder, and open_clip's model of it with weights."""
    folder = tmp_path_factory.mktemp("siglip")
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"timm_model_name": SMALL, "image_size": 32}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2, "vocab_size": 128}
    config["text_cfg"]["hf_tokenizer_name"] = str(sentencepiece(folder))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    theirs = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
        theirs.logit_scale.fill_(4.76)
        theirs.logit_bias.fill_(-12.9)
    torch.save(theirs.state_dict(), folder / "open_clip_model.pth")
    return folder


def recipe_of(folder, *more):
    words = ["--config", "recipes/train/tiny_siglip.yaml", "--data", ".", "--out", ".", "--clip.model_cfg", "null"]
    return parse(
        [
            *words,
            "--clip.arch",
            f"local-dir:{folder}",
            "--objective.temperature",
            "null",
            "--objective.logit_bias",
            "null",
            *more,
        ]
    )[0]


def test_a_siglip_comes_in_trains_and_goes_out_as_open_clips(small, tmp_path):
    """Towers, pooling, tokens, preprocessing, temperature and bias: what open_clip makes of the same folder."""
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{small}")
    words = open_clip.get_tokenizer(f"local-dir:{small}")
    config = recipe_of(small)
    family = build(config, tmp_path / "RUN" / "tokenizer", list)
    model = family.model.eval()
    assert type(model.towers).__name__ == "CustomTextCLIP"
    shown, ids = pictures(), family.encode_text(TEXTS)["input_ids"]
    assert torch.equal(ids, words(TEXTS)) and ids.shape == (3, 64)
    pixels = torch.stack([transform(picture.convert("RGB")) for picture in shown])
    spec = family.image
    assert (spec.mean, spec.std, spec.size, spec.resize_mode) == (INCEPTION_MEAN, INCEPTION_STD, 32, "squash")
    chunk = {"pixel_values": pixels[:3], "input_ids": ids, "valid": torch.ones(3, dtype=torch.bool)}
    with torch.no_grad():
        out = model(chunk)
        wanted = theirs.eval()(pixels[:3], ids)
    assert torch.allclose(out["left"], wanted[0], atol=1e-6) and torch.allclose(out["right"], wanted[1], atol=1e-6)
    assert torch.equal(out["scalars"]["log_scale"].exp()[0], wanted[2]) and float(
        out["scalars"]["logit_bias"]
    ) == float(theirs.logit_bias)
    save(config, family, model.state_dict(), tmp_path / "RUN" / "export")
    export = tmp_path / "RUN" / "export"
    again, _, read = open_clip.create_model_and_transforms(f"local-dir:{export}")
    state, original = again.state_dict(), theirs.state_dict()
    assert state.keys() == original.keys() and all(torch.equal(state[n], original[n]) for n in state)
    assert torch.equal(read(shown[0].convert("RGB")), pixels[0])
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{export}")(TEXTS), ids)

    taken, processor = AutoModel.from_pretrained(export).eval(), AutoProcessor.from_pretrained(export)
    assert torch.equal(processor(images=shown)["pixel_values"], pixels)
    assert torch.equal(processor(text=TEXTS)["input_ids"], ids)
    with torch.no_grad():
        image = taken.get_image_features(**processor(images=shown))
        text = taken.get_text_features(**processor(text=TEXTS))
        assert torch.allclose(image.pooler_output, theirs.encode_image(pixels, normalize=True), atol=1e-6)
        states = theirs.visual.trunk.forward_features(pixels)
        assert torch.allclose(image.last_hidden_state, states, atol=1e-5) and states.ndim == 3
        pooled = theirs.text.text_projection(text.last_hidden_state[:, -1])
    assert torch.allclose(text.pooler_output, torch.nn.functional.normalize(pooled, dim=-1), atol=1e-6)


def test_curation_and_grading_see_what_open_clip_sees(small, tmp_path):
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{small}")
    words = open_clip.get_tokenizer(f"local-dir:{small}")
    config = recipe_of(small)
    family = build(config, tmp_path / "RUN" / "tokenizer", list)
    export = tmp_path / "RUN" / "export"
    save(config, family, family.model.state_dict(), export)
    shown = [picture.convert("RGB") for picture in pictures(4)]
    theirs.eval()
    with torch.no_grad():
        left = theirs.encode_image(torch.stack([transform(picture) for picture in shown]), normalize=True)
        right = theirs.encode_text(words(TEXTS[:1] * 4), normalize=True)
    meter = ClipSignal(model=str(export)).load("clip_score")
    seen = [(meter.pixels(picture), TEXTS[0], None) for picture in shown]
    assert np.allclose(meter.columns(seen)["clip_score"].to_numpy(), (left * right).sum(1), atol=1e-6)

    write_manifest(export / "gemsmith.json", {"steps": 1, "samples": 256, "config": as_dict(config)})
    graded = load(export)
    assert torch.allclose(graded.embed_images(graded.images(shown)), left, atol=1e-6)
    assert torch.allclose(graded.embed_texts(TEXTS[:1]), right[:1], atol=1e-6)


def test_weights_in_a_file_are_scored_as_their_architecture_sees_pictures(small, monkeypatch):
    """open_clip knows the published weights' way by their tag alone, and would take OpenAI's."""
    config = json.loads((small / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-SigLIP2-256", config)
    signal = ClipSignal(model="ViT-B-32-SigLIP2-256", pretrained=str(small / "open_clip_model.pth"))
    look = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    assert signal.content()["preprocess"] == look, "another way of seeing is another signal"
    shown = photograph(61, 45)
    assert torch.equal(signal.load("clip_score").pixels(shown), image_transform(32, is_train=False, **look)(shown))
    plain = ClipSignal(model="ViT-B-32", pretrained=str(small / "open_clip_model.pth"))
    assert "preprocess" not in plain.content()


@pytest.mark.parametrize(("resize_mode", "tolerance"), [("squash", 1e-6), ("shortest", 0.1)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_sees_pictures_as_the_evaluation_transform_does(interpolation, resize_mode, tolerance, tmp_path):
    """Exactly where the whole picture is resized in one step; a centre square is cut before it, not after."""
    look = {"mean": INCEPTION_MEAN, "std": INCEPTION_STD, "interpolation": interpolation, "resize_mode": resize_mode}
    shown = photograph(61, 45)
    files = {"png": encoded(shown, "PNG"), "txt": b"a text", "json": b'{"uid": "a"}'}
    with tarfile.open(tmp_path / "00000000.tar", "w") as tar:
        for extension, payload in files.items():
            entry = tarfile.TarInfo(f"000000.{extension}")
            entry.size = len(payload)
            tar.addfile(entry, io.BytesIO(payload))
    config = LoaderConfig(batch=1, chunk=1)
    spec = ImageSpec(size=32, **look)
    loader = Loader(Shards(tmp_path), config, spec, lambda _: {}, seed=0, rank=0, world_size=1)
    ((chunk,),) = loader.batches(0, 1)
    wanted = image_transform(32, is_train=False, **look)(shown)
    assert (chunk["pixel_values"][0] - wanted).abs().mean() < tolerance
    other = {"bicubic": "bilinear", "bilinear": "bicubic"}[interpolation]
    assert (image_transform(32, is_train=False, **{**look, "interpolation": other})(shown) - wanted).abs().max() > 1e-3


def test_real_siglip_architectures_are_open_clips_parameter_for_parameter():
    """On the meta device, so that no memory is touched: names and shapes of the whole ViT-B-16-SigLIP."""
    with torch.device("meta"):
        ours = Clip.from_recipe(ClipRecipe(arch="ViT-B-16-SigLIP"), ObjectiveConfig(coupled="siglip"))
        theirs = open_clip.create_model("ViT-B-16-SigLIP", device="meta")
    found = {name: x.shape for name, x in ours.to_open_clip(ours.state_dict()).items()}
    assert found == {name: x.shape for name, x in theirs.state_dict().items()}


def test_siglip_is_built_in_parts_and_computes_its_activations_again(small):
    """As ZeRO-3 builds it, from the same bits; and what is not kept is made again with the same gradients."""
    config = json.loads((small / "open_clip_config.json").read_text())["model_cfg"]

    def made():
        torch.manual_seed(3)
        return Clip.from_recipe(ClipRecipe(model_cfg=config), ObjectiveConfig(coupled="siglip"))

    whole = made()
    with (deferred := Deferred()):
        parts = dict(made().named_parameters())
        for name, parameter in whole.named_parameters():
            with deferred.values(parts[name]):
                assert torch.equal(parts[name], parameter), name
    chunk = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": torch.randint(0, 100, (3, 64))}
    found = []
    for _ in range(2):
        whole.zero_grad()
        out = whole.train()(chunk)
        (out["left"] * out["right"].cumsum(1)).sum().backward()
        found.append({name: p.grad.clone() for name, p in whole.towers.named_parameters()})
        whole.checkpoint_activations()
    assert max(differences(found[1], found[0])) < 1e-6


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_timms_vits_run_and_pool_the_kept_patches_alone(prefix):
    """Without class token (attention pooling), with one, with registers behind it; the rows are picked by hand."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 8}
    token = {"class_token": prefix > 0, "reg_tokens": max(0, prefix - 1), "global_pool": "token" if prefix else "map"}
    visual = torch.nn.Module()
    visual.trunk = trunk = timm.create_model("vit_base_patch16_224", **sizes, **token)
    take_over(visual, 0.5)
    pixels, kept = torch.randn(2, 3, 32, 32), torch.tensor([[0, 1, 5, 15], [2, 7, 8, 9]])
    rows = torch.cat([torch.arange(prefix).expand(2, -1), prefix + kept], 1)
    tokens = trunk._pos_embed(trunk.patch_embed(pixels))
    picked = torch.stack([row[which] for row, which in zip(tokens, rows)])
    expected = trunk.forward_head(trunk.norm(trunk.blocks(trunk.norm_pre(picked))))
    with only(visual, kept):
        assert torch.equal(trunk(pixels), expected)
    assert trunk.num_prefix_tokens == prefix and grid_of(visual) == (4, 4)
    assert not torch.allclose(trunk(pixels), expected, atol=1e-6), "outside, all of them"


def test_a_siglip_trains_on_half_its_patches_and_goes_out_with_all(small, shards, tmp_path):
    """The cached step against one plain step on the same patches; open_clip's model of the export drops none."""
    batch = ["--loader.batch", "12", "--loader.chunk", "5", "--loader.captions", "caption", "--precision", "fp32"]
    config = recipe_of(small, "--clip.patch_dropout", "0.5", *batch)
    family = build(config, tmp_path / "tokenizer", list)
    model = family.model.double().train()
    chunks = [doubled(c) for c in chunks_of(shards, family, config)]
    assert [c["patches"].shape for c in chunks] == [(5, 8), (5, 8), (2, 8)]
    with patched_float():
        loss, expected = plain_gradients(model, [whole_batch(chunks)], config.objective)
        metrics, found = cached_gradients(model, chunks, config.objective)
        whole = {name: x for name, x in whole_batch(chunks).items() if name != "patches"}
        full, _ = plain_gradients(model, [whole], config.objective)
    assert max(differences(found, expected)) < 1e-12 and abs(float(metrics["loss"] - loss)) < 1e-12
    assert abs(float(full - loss)) > 1e-6

    save(config, family, model.float().state_dict(), tmp_path / "export")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").train()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(theirs.encode_image(pixels), model.eval().towers.encode_image(pixels))


LOOKS = {
    ("ViT-B-16-SigLIP", "webli"): (list(INCEPTION_MEAN), "bicubic", "squash"),
    ("ViT-B-16-SigLIP", None): (list(INCEPTION_MEAN), "bicubic", "squash"),
    ("ViT-B-16-SigLIP", "some/file.pt"): (list(INCEPTION_MEAN), "bicubic", "squash"),
    ("ViT-L-14", "laion2b_s32b_b82k"): (list(INCEPTION_MEAN), "bicubic", "shortest"),
    ("ViT-L-14", "openai"): (list(OPENAI_DATASET_MEAN), "bicubic", "shortest"),
    ("ViT-L-14", None): (list(OPENAI_DATASET_MEAN), "bicubic", "shortest"),
    ("MobileCLIP-S1", None): ([0.0] * 3, "bilinear", "shortest"),
    ("no-such-model", None): (list(OPENAI_DATASET_MEAN), "bicubic", "shortest"),
}


@pytest.mark.parametrize(("named", "look"), LOOKS.items(), ids=lambda x: str(x[:2]))
def test_looks_are_those_of_the_published_weights(named, look):
    found = preprocess_of(*named)
    assert (found["mean"], found["interpolation"], found["resize_mode"]) == look


def test_bad_looks_and_towers_are_one_line(small, tmp_path):
    with pytest.raises(UserError, match=r"loader\.resize_mode: .* was trained with squash; write that"):
        look_of(f"local-dir:{small}", None, "shortest", "clip.arch")
    with pytest.raises(UserError, match=r"local-dir:.*none: cannot be read .*open_clip_config\.json"):
        look_of(f"local-dir:{tmp_path / 'none'}", None, None, "clip.arch")
    record = json.loads((small / "open_clip_config.json").read_text())
    record["preprocess_cfg"]["resize_mode"] = "longest"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"clip\.arch: .* bars at their sides"):
        look_of(f"local-dir:{tmp_path}", None, None, "clip.arch")
    with pytest.raises(UserError, match=r"mmgem\.vision\.arch: local-dir:.* has no plain ViT"):
        vision_tower({"arch": f"local-dir:{small}"})
