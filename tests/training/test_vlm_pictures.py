"""A VLM sees whole pictures with their aspect: in training just the tensors that it is graded and taken away with."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import vlm2vec_config, write_shards
from tests.training.test_data_images import encoded, photograph
from tests.training.vlm import CAPTIONS, QWEN, picture, tiny
from training.auto import AutoProcessor
from training.data import Drawn, Loader, Shards
from training.data.rows import Item, Row
from training.export import save
from training.families import build
from training.models.vlm_inputs import instruct, of_side

SIZES = {(300, 120): (64, 26), (90, 200): (29, 64), (40, 30): (40, 30), (64, 64): (64, 64)}
"""Of pictures, and of what is seen of them where the longest side is 64."""
PAYLOADS = [
    (extension, encoded(photograph(*size, seed=number), kind))
    for number, size in enumerate(SIZES)
    for extension, kind in (("jpg", "JPEG"), ("png", "PNG"))
]


def native(payload):
    return Image.open(io.BytesIO(payload)).convert("RGB")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pictures"), [len(PAYLOADS)], pictures=lambda n: dict([PAYLOADS[n]]))


@pytest.fixture(scope="module", params=["64", "null"])
def taken(request, tmp_path_factory):
    """(config, family, the processor of its export)"""
    folder = tmp_path_factory.mktemp("run")
    config = vlm2vec_config("--loader.decode_size", request.param, "--vlm2vec.backbone", str(QWEN))
    family = build(config, folder / "tokenizer", lambda: CAPTIONS)
    save(config, family, family.model.state_dict(), folder / "export")
    return config, family, AutoProcessor.from_pretrained(folder / "export")


def loader(shards, config, family, cache=None, **changes):
    settings = dataclasses.replace(config.loader, batch=len(PAYLOADS), chunk=len(PAYLOADS), **changes)
    ours = {"seed": 0, "rank": 0, "world_size": 1, "extra": family.extra, "cache": cache}
    return Loader(Shards(shards), settings, family.image, family.encode_text, **ours)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_training_grading_and_a_folder_make_the_same_tensors(taken, shards):
    """Bit for bit, of jpeg and png, larger and smaller than the limit, with rows and pairs."""
    config, family, processor = taken
    reading = loader(shards, config, family)
    ((chunk,),) = reading.batches(0, 1)
    found, shown = of_side(chunk, "query"), [native(PAYLOADS[int(key)][1]) for key in reading.ids(0)]
    assert chunk["valid"].all() and same(found, family.encode_images(shown)) and same(found, processor(images=shown))
    task = instruct(config.vlm2vec.instruction, image=True)
    rows = [Row(query=Item(text=task, image=picture), positive=Item(text="a")) for picture in shown]
    assert same(found, of_side(family.extra("rows", [Drawn(fields={"row": row}) for row in rows]), "query"))
    seen = shown
    if config.loader.decode_size:
        seen = [picture.resize(SIZES[picture.size], Image.Resampling.BICUBIC) for picture in shown]
    backbone = family.tokenizer.image_processor(images=seen, return_tensors="pt")
    assert torch.equal(found["pixel_values"], backbone["pixel_values"])
    assert torch.equal(found["image_grid_thw"], backbone["image_grid_thw"])


def test_kept_decoded_they_are_the_same(taken, shards, tmp_path):
    config, family, _ = taken
    if not config.loader.decode_size:
        return  # refused: test_vlm2vec_train
    plain, first, again = (
        list(loader(shards, config, family, cache).batches(0, 2)) for cache in (None, tmp_path / "d", tmp_path / "d")
    )
    assert all(same(b, a) for x in (first, again) for ((a,), (b,)) in zip(plain, x, strict=True))


def test_augmented_they_keep_to_the_limit(taken, shards, tmp_path):
    config, family, _ = taken
    longest = config.loader.decode_size
    moves = {"crop_scale": (0.2, 0.5), "flip": True, "color_jitter_prob": 0.5, "gray_scale_prob": 0.3}
    cache = tmp_path / "d" if longest else None
    for kept in (None, cache):
        reading = loader(shards, config, family, kept, **moves)
        for own, key in enumerate(reading.ids(0)):
            pixels, size = reading.row("pairs", (0, own)).fields["pixels"], native(PAYLOADS[int(key)][1]).size
            scale = min(1, longest / max(size)) if longest else 1
            assert 0.15 < pixels.shape[0] * pixels.shape[1] / (np.prod(size) * scale**2) < 0.6
        ((one,),), ((two,),) = (loader(shards, config, family, kept, threads=n, **moves).batches(0, 1) for n in (1, 3))
        assert one["valid"].all() and same(one, two)
    mirrored, plain = (loader(shards, config, family, flip=flip) for flip in (True, False))
    turned = 0
    for own in range(len(PAYLOADS)):
        found, wanted = (reading.row("pairs", (0, own)).fields["pixels"] for reading in (mirrored, plain))
        turned += (flipped := not np.array_equal(found, wanted))
        assert not flipped or np.array_equal(found[:, ::-1], wanted)
    assert 0 < turned < len(PAYLOADS)


def test_a_picture_that_the_processor_refuses_is_a_hole(taken, tmp_path):
    """Qwen's refuses what is more than 200 times as long as wide; scaled down to 64 it no longer is."""
    config, family, _ = taken
    sizes = [(30, 20), (1, 300), (20, 30), (40, 40)]
    folder = write_shards(tmp_path, [4], pictures=lambda n: {"png": encoded(photograph(*sizes[n]), "PNG")})
    settings = dataclasses.replace(config.loader, batch=4, chunk=4)
    ours = {"seed": 0, "rank": 0, "world_size": 1, "extra": family.extra}
    reading = Loader(Shards(folder), settings, family.image, family.encode_text, **ours)
    ((chunk,),) = reading.batches(0, 1)
    numbers = [int(key) for key in reading.ids(0)]
    lost = [number == 1 and not config.loader.decode_size for number in numbers]
    assert chunk["valid"].tolist() == [not x for x in lost]
    assert dict(reading.holes) == ({"image_broken": 1} if any(lost) else {})
    assert [draw == 0 for draw in chunk["draws"].tolist()] == lost
    assert chunk["right_valid"].flatten().tolist() == chunk["valid"].tolist()
    seen = [photograph(*sizes[number]) for number, gone in zip(numbers, lost) if not gone]
    assert torch.equal(chunk["query.pixel_values"], family.encode_images(seen)["pixel_values"])
    assert family.model(chunk)["left"].isfinite().all()


def test_a_row_goes_with_its_refused_picture_and_nothing_else_is_forgiven(monkeypatch):
    _, inputs, _ = tiny("qwen2_vl", negatives=1)
    odd, good = Item(image=Image.new("RGB", (300, 1))), Item(image=picture(1))
    rows = [
        Row(query=good, positive=Item(text="a")),
        Row(query=Item(text="b"), positive=odd),
        Row(query=Item(text="c"), positive=good, negatives=[odd]),
        Row(query=Item(text="d"), positive=good, negatives=[good, odd]),  # beyond the room, which is 1
    ]
    assert inputs.collate(rows)["valid"].tolist() == [True, False, False, True]
    one = inputs.collate(rows[1:2])
    assert one["valid"].tolist() == [False] and not one["right_valid"].any()

    side = inputs.side

    def tired(items, **more):
        if len(items) > 1:
            raise ValueError("no more of these")
        return side(items, **more)

    monkeypatch.setattr(inputs, "side", tired)
    with pytest.raises(ValueError, match="no more of these"):
        inputs.collate([rows[0], rows[3]])
