"""Pictures of the loader: two decoders that agree, crops and colours by another library, and FLIP's patches."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import functional as TF

from curation.errors import UserError
from tests.training.conftest import tiny_config, write_shards
from training.config import ObjectiveConfig
from training.data import ImageSpec, Loader, Shards, images
from training.families import build
from training.family_config import ClipRecipe
from training.models.clip import Clip
from training.models.patches import take_over


def photograph(width, height, seed=0):
    """Smooth colours with some texture, as photographs have them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def by_pillow(payload, side, mode, box):
    """The same box of the unscaled decode, resized in one step."""
    image = Image.open(io.BytesIO(payload)).convert("RGB")
    left, top, w, h = 0.0, 0.0, *map(float, image.size)
    if mode == "shortest":
        left, top, w, h = (w - min(w, h)) / 2, (h - min(w, h)) / 2, min(w, h), min(w, h)
    edges = (left + box[0] * w, top + box[1] * h, left + box[2] * w, top + box[3] * h)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=edges))


def difference(a, b):
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("kind", ["EPS", "PPM"])
def test_formats_that_the_web_does_not_show_are_not_opened(kind):
    """For EPS, Pillow would run Ghostscript."""
    with pytest.raises(UnidentifiedImageError):
        images.decode(encoded(photograph(90, 60), kind), 32, "squash")


@pytest.mark.parametrize("mode", ["squash", "shortest"])
@pytest.mark.parametrize("box", [images.WHOLE, (0.1, 0.2, 0.75, 0.9)])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1600, 900), (100, 80), (224, 224)])
def test_scaled_decoding_differs_from_pillows_unscaled_by_a_level_or_two(mode, box, size):
    for settings in ({"quality": 90}, {"quality": 80, "subsampling": 0}, {"progressive": True}):
        payload = encoded(photograph(*size), "JPEG", **settings)
        found = images.decode(payload, 64, mode, box)
        assert found.shape == (64, 64, 3) and found.dtype == np.uint8
        assert difference(found, by_pillow(payload, 64, mode, box)) < 1.5, "of 255 levels, in the mean"


def test_the_fast_path_and_its_fallback_agree(monkeypatch):
    payload = encoded(photograph(500, 375), "JPEG", quality=90)
    fast = images.decode(payload, 64, "squash")
    assert images._jpeg(payload, 64, 64) is not None
    monkeypatch.setattr(images, "_jpeg", lambda *_: None)
    slow = images.decode(payload, 64, "squash")
    assert difference(fast, slow) < 0.5 and np.abs(fast.astype(int) - slow).max() <= 8
    unscaled = encoded(photograph(60, 50), "JPEG", quality=90)
    slow = images.decode(unscaled, 64, "squash")
    monkeypatch.undo()
    assert np.array_equal(images.decode(unscaled, 64, "squash"), slow), "where nothing is scaled, they are equal"


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (photograph(90, 70).convert("CMYK"), "JPEG"),
        (photograph(90, 70).convert("L"), "JPEG"),
        (photograph(90, 70), "PNG"),
        (photograph(90, 70).convert("P"), "PNG"),
        (photograph(90, 70).convert("RGBA"), "PNG"),
        (photograph(90, 70), "WEBP"),
        (photograph(90, 70).convert("LA"), "PNG"),
    ],
)
def test_other_pictures_are_read_by_pillow(image, kind):
    payload = encoded(image, kind)
    assert difference(images.decode(payload, 32, "squash"), by_pillow(payload, 32, "squash", images.WHOLE)) < 1.5


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((500, 375), (64, 48)), ((90, 200), (29, 64)), ((64, 40), (64, 40)), ((30, 20), (30, 20)), ((2, 900), (1, 64))],
)
@pytest.mark.parametrize(("kind", "settings"), [("PNG", {}), ("JPEG", {"quality": 90})])
def test_a_picture_that_fits_keeps_its_aspect_and_its_pixels_where_it_is_small(size, fitted, kind, settings):
    payload = encoded(photograph(*size), kind, **settings)
    native = Image.open(io.BytesIO(payload)).convert("RGB")
    found = images.decode(payload, 64, "fit")
    assert np.array_equal(found, np.asarray(native.resize(fitted, Image.Resampling.BICUBIC)))
    assert np.array_equal(images.decode(payload, 0, "fit"), np.asarray(native)), "no limit"
    assert np.array_equal(images.cut(found, 64, "fit", images.WHOLE), found), "done twice it is done once"


def test_a_crop_that_fits_is_cut_and_scaled_as_the_whole_is():
    whole = photograph(80, 40)
    payload, box, pixels = encoded(whole, "PNG"), (0.25, 0.5, 0.75, 1.0), np.asarray(whole)
    assert np.array_equal(images.decode(payload, 100, "fit", box), pixels[20:40, 20:60])
    assert np.array_equal(images.cut(pixels, 100, "fit", box), pixels[20:40, 20:60])
    assert images.decode(payload, 40, "fit", box).shape == (10, 20, 3)
    kept = images.cut(images.decode(payload, 40, "fit"), 40, "fit", box)
    assert difference(images.decode(payload, 40, "fit", box), kept) < 1.5, "also of what was kept decoded"


def test_a_bomb_is_not_decoded_to_see_whether_it_fits():
    with pytest.raises(ValueError, match="decompression_bomb"):
        images.decode(encoded(Image.new("L", (12_000, 8_000)), "PNG"), 64, "fit")


def test_boxes_have_the_area_and_aspect_that_is_asked_for():
    boxes = [images.draw_box(np.random.default_rng(i), 0.3, 0.6) for i in range(2_000)]
    w, h = (np.array([b[i + 2] - b[i] for b in boxes]) for i in (0, 1))
    assert all(0 <= b[0] < b[2] <= 1 + 1e-9 and 0 <= b[1] < b[3] <= 1 + 1e-9 for b in boxes)
    assert (w * h).min() >= 0.3 - 1e-9 and (w * h).max() <= 0.6 + 1e-9
    assert 0.74 < (w / h).min() < 0.8 and 1.25 < (w / h).max() < 1.34
    left = np.array([b[0] / (1 - (b[2] - b[0])) for b in boxes if b[2] - b[0] < 0.99])
    assert abs(left.mean() - 0.5) < 0.03, "anywhere"


@pytest.mark.parametrize(
    ("place", "move"),
    [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation), (3, TF.adjust_hue)],
)
def test_colours_move_as_torchvision_moves_them(place, move):
    image = photograph(40, 40)
    strength = tuple(0.4 if i == place else 0.0 for i in range(4))
    found = images.jitter(np.asarray(image), strength, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    amounts = [rng.uniform(-s, s) for s in strength]
    expected = np.asarray(move(image, amounts[place] if place == 3 else 1 + amounts[place]))
    assert np.abs(found.astype(int) - expected).max() <= 1 and not np.array_equal(found, np.asarray(image))
    assert (np.ptp(images.grey(found), axis=2) == 0).all()


def chunks_of(folder, spec, encode_text, rank=0, world=1, start=0, stop=2, **changes):
    config = dataclasses.replace(tiny_config("--loader.batch=12", "--loader.chunk=4").loader, retain=0, **changes)
    it = Loader(Shards(folder), config, spec, encode_text, seed=5, rank=rank, world_size=world)
    return list(it.batches(start, stop))


def test_patches_are_a_draw_of_seed_epoch_and_uid(tmp_path):
    folder = write_shards(tmp_path / "data", [12])
    spec = ImageSpec(size=16, mean=(0.5,) * 3, std=(0.2,) * 3, patches=49, keep=20)

    def encode(captions):
        return {"n": torch.tensor([int(c.split()[1]) for c in captions])}

    def by_sample(batch):
        return {int(n): tuple(p) for c in batch for n, p in zip(c["n"], c["patches"].tolist())}

    whole = [by_sample(b) for b in chunks_of(folder, spec, encode)]
    halves = [chunks_of(folder, spec, encode, rank=r, world=2, chunk=5, threads=2) for r in (0, 1)]
    assert [by_sample(a) | by_sample(b) for a, b in zip(*halves)] == whole
    assert by_sample(*chunks_of(folder, spec, encode, start=1, crop_scale=(0.5, 1.0), flip=True)) == whole[1]
    assert all(whole[0][n] != whole[1][n] for n in range(12)), "another epoch, other patches"
    for rows in whole:
        assert all(len(set(p)) == 20 and list(p) == sorted(p) and p[0] >= 0 and p[-1] < 49 for p in rows.values())
    seen = np.bincount([p for rows in whole for ps in rows.values() for p in ps], minlength=49)
    assert seen.max() < 24 * 20 / 49 + 4 * np.sqrt(24 * 0.25), "none is preferred"
    assert "patches" not in chunks_of(folder, dataclasses.replace(spec, keep=0), encode)[0][0]


def plain_features(visual, pixels, kept):
    """open_clip's ViT written out, on the patches of `kept`: (pooled, patch tokens)."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = torch.stack([row[[0, *(1 + i for i in k)]] for row, k in zip(x, kept.tolist())])
    x = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    return x[:, 0], x[:, 1:]


TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def test_clip_sees_the_kept_patches_in_both_passes_and_all_when_graded():
    torch.manual_seed(0)
    model = Clip.from_recipe(ClipRecipe(model_cfg=TOWERS), ObjectiveConfig()).train()
    spec = ImageSpec.of_vit(model.towers.visual.grid_size, model.patch_dropout, size=32, mean=(0,) * 3, std=(1,) * 3)
    assert (spec.patches, spec.keep) == (16, 8)
    kept = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15], [1, 3, 5, 7, 9, 11, 13, 14]])
    chunk = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.ones(2, 8, dtype=torch.long)}
    first, second = (model(chunk | {"patches": kept})["left"] for _ in range(2))
    assert torch.equal(first, second)
    visual = model.towers.visual
    pooled, _ = plain_features(visual, chunk["pixel_values"], kept)
    torch.testing.assert_close(first, torch.nn.functional.normalize(pooled @ visual.proj, dim=-1))
    every = torch.arange(16).expand(2, -1)
    pooled, _ = plain_features(visual, chunk["pixel_values"], every)
    whole = torch.nn.functional.normalize(pooled @ visual.proj, dim=-1)
    torch.testing.assert_close(model(chunk)["left"], whole)
    features = model.eval().towers.encode_image(chunk["pixel_values"])
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), whole)


def test_mmgem_pools_the_kept_patches_alone(tmp_path):
    config = tiny_config("--mmgem.vision.patch_dropout", "0.75")
    folder = write_shards(tmp_path / "data", [12])
    family = build(config, tmp_path / "tokenizer", Shards(folder).every_caption)
    model = family.model.train()
    assert (family.image.patches, family.image.keep) == (16, 4)
    (chunks,) = chunks_of(folder, family.image, family.encode_text, stop=1)
    for chunk in chunks:
        _, patches = plain_features(model.vision, chunk["pixel_values"], chunk["patches"])
        expected = torch.nn.functional.normalize(model.h1(patches).mean(1), dim=-1)
        for separable in (False, True):
            torch.testing.assert_close(model(chunk, separable)["left"], expected)
    _, patches = plain_features(model.vision, chunk["pixel_values"], torch.arange(16).expand(4, -1))
    graded = model.get_image_features(chunk["pixel_values"]).pooler_output
    torch.testing.assert_close(graded, torch.nn.functional.normalize(model.h1(patches).mean(1), dim=-1))


def test_patches_that_cannot_be_dropped_are_one_clear_line():
    with pytest.raises(UserError, match="patch_dropout: Linear is no ViT of open_clip's or timm's"):
        take_over(torch.nn.Linear(2, 2), 0.5)
    with pytest.raises(UserError, match=r"patch_dropout: 1.0 is no share"):
        ImageSpec.of_vit((8, 8), 1.0, size=8, mean=(0,) * 3, std=(1,) * 3)
