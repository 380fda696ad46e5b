"""Shards in the loaders that their users have: open_clip's own, with its size file, and webdataset's."""

import argparse
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset as wds
from PIL import Image

from curation.card import braces
from tests.curation.test_card import members_of


def sources(out: Path) -> dict[str, dict[str, bytes]]:
    """By key, the members of each sample, by extension, read by tarfile; without the one with a .npy that is none,
    which both loaders refuse."""
    found: dict[str, dict[str, bytes]] = {}
    for name, payload in members_of(out).items():
        key, _, extension = name.partition(".")
        found.setdefault(key, {})[extension] = payload
    return {key: members for key, members in found.items() if "seg.npy" not in members}


def pixels(image: Image.Image) -> torch.Tensor:
    """float32 [3]: the mean colour, which tells the pictures of the pool apart."""
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(-1, 3).float().mean(0)


class Codes:
    """A tokenizer as open_clip calls it: the caption's first 24 characters as numbers."""

    def __call__(self, text: str) -> torch.Tensor:
        codes = [ord(c) for c in text[:24]]
        return torch.tensor([codes + [0] * (24 - len(codes))])


def expected_batch(found: dict[str, dict[str, bytes]]) -> Counter[tuple[tuple[float, ...], tuple[int, ...]]]:
    samples = []
    for members in found.values():
        image = Image.open(io.BytesIO(members.get("jpg") or members["png"]))
        samples.append((tuple(pixels(image).tolist()), tuple(Codes()(members["txt"].decode())[0].tolist())))
    return Counter(samples)


@pytest.mark.parametrize("train", [False, True])
def test_open_clips_loader_gives_every_sample(done: Path, train: bool) -> None:
    """As it ships, with the webdataset that it asks for."""
    from open_clip_train import data as loader

    urls = str(done / braces(len(list((done / "shards").glob("*.tar")))))
    found = sources(done)
    shards = json.loads((done / "manifest.json").read_text())["shards"]
    written = json.loads((done / "manifest.json").read_text())["kept"]
    assert loader.get_dataset_size(urls) == (written, shards)  # from sizes.json: no --train-num-samples is needed
    batch = 4 if train else 1000
    arguments = argparse.Namespace(
        train_data=urls,
        val_data=urls,
        train_num_samples=None,
        val_num_samples=len(found),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=1,
        world_size=1,
    )
    data = loader.get_wds_dataset(arguments, pixels, is_train=train, epoch=0, tokenizer=Codes())
    seen: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
    for images, texts in data.dataloader:
        seen += [(tuple(i.tolist()), tuple(t.tolist())) for i, t in zip(images, texts, strict=True)]
    expected = expected_batch(found)
    if train:  # whole batches, and when the shards are through it begins anew
        once = len(found) // batch * batch
        assert Counter(seen[:once]) <= expected and set(seen) <= set(expected)
        assert len(seen) == data.dataloader.num_samples >= written
    else:
        assert Counter(seen) == expected


def test_webdatasets_own_decoding(done: Path) -> None:
    urls = [str(path) for path in sorted((done / "shards").glob("*.tar"))]
    found = sources(done)
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil", handler=wds.ignore_and_continue)
    keys = []
    for sample in dataset:
        members = found[sample["__key__"]]
        assert sample["txt"] == members["txt"].decode()
        assert "json" not in members or sample["json"] == json.loads(members["json"])
        image = Image.open(io.BytesIO(members.get("jpg") or members["png"]))
        assert torch.equal(pixels(sample.get("jpg") or sample["png"]), pixels(image))
        keys.append(sample["__key__"])
    assert sorted(keys) == sorted(found) and len(keys) == len(set(keys))


def test_webdatasets_indexed_loader_finds_every_sample_by_its_number(done: Path, tmp_path: Path) -> None:
    """`index.json` is what wids opens: a dataset with a length, read in any order."""
    import wids

    found = sources(done)
    written = json.loads((done / "manifest.json").read_text())["kept"]
    dataset = wids.ShardListDataset(
        str(done / "shards" / "index.json"), cache_dir=str(tmp_path / "cache"), keep=True, transformations=[]
    )
    assert len(dataset) == written
    keys = []
    for number in reversed(range(len(dataset))):
        sample = dataset[number]
        keys.append(sample["__key__"])
        for extension, payload in found.get(sample["__key__"], {}).items():
            stream = sample[f".{extension}"]
            stream.seek(0)
            assert stream.read() == payload
    assert set(found) <= set(keys) and len(keys) == len(set(keys)) == written
