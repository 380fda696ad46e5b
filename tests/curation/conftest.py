"""Small pools made by tarfile and Pillow, and one local Ray for all tests of curation."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def picture(seed: int, size: tuple[int, int] = (96, 80), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth random picture: its perceptual hash survives encoding, and no two look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def sample(n: int, **members: bytes) -> dict[str, bytes]:
    """A whole img2dataset sample; members given replace or add to it."""
    caption = f"a picture of the thing with number {n} on the table"
    meta = {"uid": f"{n:032x}", "caption": caption, "url": f"https://example.org/{n}.jpg", "key": f"{n:09d}"}
    return {"jpg": picture(n), "txt": caption.encode(), "json": json.dumps(meta).encode(), **members}


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return path


def with_unheard_values(columns: Mapping[str, object]) -> pa.Table:
    """Two rows of these columns, and others: the second row's dates Python has no value for, and a name comes twice."""
    late = pa.array([0, 300_000_000_000_000_000], pa.int64())  # microseconds, to the year 11476
    last = pa.array([0, 253_402_300_799_000_000], pa.int64())  # 9999-12-31T23:59:59 in Greenwich
    more = {
        "day": pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32()),
        "at": late.cast(pa.timestamp("us")),
        "zoned": last.cast(pa.timestamp("us", tz="+05:00")),
        "nowhere": late.cast(pa.timestamp("us", tz="Mars/Olympus")),
        "days": pa.ListArray.from_arrays([0, 1, 2], pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32())),
    }
    table = pa.table({**columns, **more, "score": [1, 2]})
    return table.append_column("score", pa.array(["second", "second"]))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, where nothing may be left."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 40 samples: sound ones, copies (bytes, pixels, uid), other languages, and one of each error."""
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(3):
        samples = {f"{n:09d}": sample(n) for n in range(40 * shard, 40 * shard + 40)}
        write_tar(folder / f"{shard:05d}.tar", samples)
    odd = {f"{n:09d}": sample(n) for n in range(120, 140)}
    odd["000000120"]["json"] = b"{not json"
    odd["000000121"]["txt"] = b"\xff\xfe caption"
    odd["000000122"]["jpg"] = odd["000000122"]["jpg"][:300]
    del odd["000000123"]["jpg"]
    odd["000000124"] = {"jpg": picture(124)}
    odd["000000125"]["jpg"] = picture(3)  # the bytes of sample 3
    odd["000000126"]["json"] = odd["000000127"]["json"]  # the uid of sample 127
    odd["000000128"]["txt"] = "ein kleiner Hund läuft über die grüne Wiese hinter dem Haus".encode()
    odd["000000129"] = {"png": picture(129, kind="PNG"), "txt": b"a picture without any json beside it"}
    odd["000000130"]["seg.npy"] = b"another member of this sample"
    odd["000000131"]["txt"] = b"<script>alert('out of the page')</script> a caption that bites"
    odd["000000132"]["txt"] = b"IMG_2041.JPG"
    write_tar(folder / "00003.tar", odd)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model config, checkpoint) of a small open_clip model with random weights."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    config, weights = folder / "tiny_clip_for_tests.json", folder / "weights.pt"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(config.stem).state_dict(), weights)
    return config, weights


WORDS = [
    "a", "the", "photo", "image", "of", "photographer", "dog", "cat", "tree", "house",
    "red", "blue", "runs", "sits", "on", "grass", "near", "water", "and",
]  # fmt: skip


def write_tokenizer(folder: Path) -> int:
    from transformers import BertTokenizer

    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(entries))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(entries)


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP captioner of two small layers with random weights, as `save_pretrained` leaves one."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    folder = tmp_path_factory.mktemp("blip")
    size = write_tokenizer(folder)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": size, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(3)
    config = BlipConfig(
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        text_config={**layers, **text, "encoder_hidden_size": 32, "max_position_embeddings": 32},
        initializer_range=0.5,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("sentences")
    size = write_tokenizer(folder)
    torch.manual_seed(4)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=size, **settings, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray for the session; curate finds it and leaves it running."""
    import logging

    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")  # Ray refuses to count more than are visible
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=1,  # as Ray counts; nothing computes on it
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200 << 20,
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def recipe(tiny_clip: tuple[Path, Path]) -> dict[str, object]:
    """A recipe with every kind of signal and most selectors, as YAML would give it."""
    return {
        "signals": {
            "text": {"kind": "text"},
            "language": {"kind": "language"},
            "image": {"kind": "image"},
            "fingerprints": {"kind": "fingerprints"},
            "clip_score": {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])},
        },
        "selectors": {
            "language": {"kind": "language", "languages": ["en"]},
            "caption_rules": {"kind": "caption_rules", "min_words": 3},
            "score": {"kind": "fraction", "column": "clip_score", "fraction": 0.8},
            "copies": {"kind": "exact_duplicates"},
            "near": {"kind": "near_duplicates"},
            "balance": {"kind": "cluster_balance", "clusters": 5, "cap_quantile": 0.7},
        },
        "seed": 3,
        "unit_samples": 16,
        "shard_samples": 25,
        "max_error_rate": 0.2,
    }


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, pool: Path, recipe: dict[str, object], ray_here: None) -> Path:
    """The pool, curated by the recipe to its end."""
    from curation.config import parse_config
    from curation.pipeline import curate

    out = tmp_path_factory.mktemp("done") / "out"
    curate(parse_config(recipe), pools=[str(pool)], out=out, workers=2)
    return out
