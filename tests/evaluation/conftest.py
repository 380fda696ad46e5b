"""Small real models and folders for grading: no checkpoint, no network, a few milliseconds each."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


class SmallModel(torch.nn.Module):
    """A random projection of 8 x 8 pixels and of hashed words: deterministic, untrained, unit norm."""

    def __init__(self, seed: int = 0, step: int | None = None, can_caption: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vision = torch.nn.Parameter(torch.randn(192, 16, generator=generator))
        self.words = torch.nn.Parameter(torch.randn(997, 16, generator=generator))
        self.name, self.step, self.can_caption = f"small-{seed}", step, can_caption
        self.weights_hash, self.preprocess = f"weights-{seed}", {"size": 8}
        self.calls: list[tuple[str, int]] = []

    def images(self, images):
        arrays = [np.asarray(image.resize((8, 8)), dtype=np.float32) / 255 - 0.5 for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def embed_images(self, pixels):
        self.calls.append(("images", len(pixels)))
        return torch.nn.functional.normalize(pixels.flatten(1) @ self.vision, dim=1)

    @torch.no_grad()
    def embed_texts(self, texts):
        self.calls.append(("texts", len(texts)))
        rows = [self.words[[zlib.crc32(word.encode()) % 997 for word in text.split()]].sum(0) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    @torch.no_grad()
    def caption(self, pixels, max_new_tokens=32):
        bright = pixels.mean(dim=(1, 2, 3))
        texts = ["a bright red square ." if value > 0 else "a dark blue square" for value in bright]
        return [" ".join(text.split()[:max_new_tokens]) for text in texts]


def image_bytes(seed: int, kind: str = "PNG") -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def pair(key: str, seed: int, captions: list[str]) -> list[tuple[str, bytes]]:
    record = {"uid": f"uid-{key}", "caption": captions[0], "captions": captions}
    return [
        (f"{key}.png", image_bytes(seed)),
        (f"{key}.txt", captions[0].encode()),
        (f"{key}.json", json.dumps(record).encode()),
    ]


@pytest.fixture
def make_model():
    return SmallModel


@pytest.fixture
def model():
    return SmallModel()


@pytest.fixture
def pairs_folder(tmp_path):
    """23 images in two tars, one to three captions each."""
    words = [
        "red",
        "blue",
        "green",
        "small",
        "large",
        "square",
        "circle",
        "above",
        "below",
        "shiny",
        "dark",
        "old",
        "new",
    ]
    generator = np.random.default_rng(5)
    folder = tmp_path / "scenes"
    shards: list[list[tuple[str, bytes]]] = [[], []]
    for number in range(23):
        captions = [" ".join(generator.choice(words, size=5)) for _ in range(1 + number % 3)]
        shards[number // 12] += pair(f"{number:05d}", number, captions)
    for index, members in enumerate(shards):
        write_tar(folder / f"{index:05d}.tar", members)
    return folder


@pytest.fixture
def classes_folder(tmp_path):
    """30 images of 7 classes in two tars, CLIP_benchmark's layout."""
    folder = tmp_path / "zoo"
    names = ["cat", "dog", "old horse", "fish", "bird", "snake", "frog"]
    for shard in range(2):
        members = []
        for number in range(shard * 15, shard * 15 + 15):
            kind = "webp" if number % 2 else "jpg"
            members.append((f"{number:05d}.{kind}", image_bytes(number, "WEBP" if number % 2 else "JPEG")))
            members.append((f"{number:05d}.cls", str(number * number % 7).encode()))
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\na drawing of the {c}\n{c}\n")
    (folder / "dataset_type.txt").write_text("single\n")
    return folder


@pytest.fixture
def tar_writer():
    return write_tar


@pytest.fixture
def image_of():
    return image_bytes
