"""Small clean shards and the smallest recipes that take every path of the engine."""

import contextlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from curation import tar
from training.config import TrainConfig
from training.train import parse

TINY = ["--mmgem.vision.image_size", "32", "--mmgem.vision.patch_size", "8", "--mmgem.vision.width", "32"]
TINY += ["--mmgem.vision.layers", "2", "--mmgem.vision.head_width", "16", "--mmgem.embed_dim", "24"]
TINY += ["--mmgem.language.hidden_size", "32", "--mmgem.language.intermediate_size", "64"]
TINY += ["--mmgem.language.num_hidden_layers", "2", "--mmgem.tokenizer.vocab_size", "320"]
TINY += ["--loader.batch", "32", "--loader.chunk", "8", "--precision", "fp32", "--optim.warmup_steps", "2"]


def tiny_config(*overrides: str) -> TrainConfig:
    arguments = ["--config", "recipes/train/tiny_mmgem.yaml", "--data", ".", "--out", "."]
    return parse([*arguments, *TINY, *overrides])[0]


FLAVA = ["--flava.image_size", "32", "--flava.hidden_size", "32", "--flava.intermediate_size", "48"]
FLAVA += ["--flava.image_layers", "2", "--flava.text_layers", "2", "--flava.embed_dim", "24"]
FLAVA += ["--flava.tokenizer.vocab_size", "300", "--flava.codebook.vocab_size", "16"]
FLAVA += ["--flava.masks", "{patches: 6, min_block: 3, tokens: 0.3, mismatched: 0.3}"]
FLAVA += ["--loader.sources", "{}", "--loader.unit", "1", "--loader.mixing", "shares"]  # pairs alone


def flava_config(*overrides: str) -> TrainConfig:
    arguments = ["--config", "recipes/train/tiny_flava.yaml", "--out", "."]
    arguments += [] if "--data" in overrides else ["--data", "."]
    return parse([*arguments, *FLAVA, *overrides])[0]


CLIP = """{embed_dim: 16, vision_cfg: {image_size: 32, layers: 1, width: 32, head_width: 16, patch_size: 8},
 text_cfg: {context_length: 24, vocab_size: 49408, width: 32, heads: 2, layers: 1}}"""


def clip_config(*overrides: str) -> TrainConfig:
    arguments = ["--config", "recipes/train/tiny_clip.yaml", "--data", ".", "--out", "."]
    return parse([*arguments, "--clip.model_cfg", CLIP, *overrides])[0]


def siglip_config(*overrides: str) -> TrainConfig:
    return clip_config("--objective.coupled", "siglip", *overrides)


COCA_TEXT = {"context_length": 14, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
COCA = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
        "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True,
    },
    "text_cfg": {**COCA_TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**COCA_TEXT, "attn_pooler_heads": 2},
    "custom_text": True,
}  # fmt: skip


def coca_config(*overrides: str) -> TrainConfig:
    arguments = ["--config", "recipes/train/tiny_coca.yaml", "--data", ".", "--out", ".", "--loader.batch", "12"]
    return parse([*arguments, "--precision", "fp32", "--clip.model_cfg", json.dumps(COCA), *overrides])[0]


def vlm2vec_config(*overrides: str) -> TrainConfig:
    from tests.training.vlm import RECIPE

    return parse([*RECIPE, *overrides])[0]


FAMILIES = {
    "mmgem": tiny_config,
    "flava": flava_config,
    "coca": coca_config,
    "clip": clip_config,
    "siglip": siglip_config,
    "vlm2vec": vlm2vec_config,
}


def write_shards(
    folder: Path, sizes: list[int], captions: Any = None, members: Any = None, regions: Any = None, pictures: Any = None
) -> Path:
    """Shards of flat-coloured pictures whose captions name their number; `captions`, `members` and `regions` of a
    number: more; `pictures` of one: its own {extension: bytes}."""
    import io

    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        parts = []
        for _ in range(size):
            buffer = io.BytesIO()
            colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
            Image.new("RGB", (48, 40), colour).save(buffer, "JPEG")
            record: dict[str, Any] = {"uid": f"{number:032x}", "caption": f"thing {number} of colour {colour[0]}"}
            if captions is not None:
                record["captions"] = captions(number)
            if regions is not None:
                record["regions"] = regions(number)
            files = {
                **(pictures(number) if pictures else {"jpg": buffer.getvalue()}),
                "txt": record["caption"].encode(),
                "json": json.dumps(record).encode(),
                **({name: text.encode() for name, text in members(number).items()} if members else {}),
            }
            for extension, payload in files.items():
                parts += [tar.header(f"{number:06d}.{extension}", len(payload)), payload]
                parts += [bytes(tar.padded(len(payload)) - len(payload))]
            number += 1
        (folder / f"{shard:08d}.tar").write_bytes(b"".join([*parts, tar.END]))
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bridges.write_backbones` writes."""
    from tests.training.bridges import write_backbones

    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [40, 25, 35])


@contextlib.contextmanager
def largest_file(size: int):
    """Real writes past `size` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
