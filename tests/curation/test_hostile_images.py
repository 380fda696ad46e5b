"""Pictures of every odd kind through the whole of measure: each has pixels or a reason, and none stops the rest.

What Pillow sees is the oracle: sizes are those of the stored pixels, as open_clip's loader gives them to a model.
"""

import io
import resource
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image, ImageFile
from transformers import BlipImageProcessor

from curation import store
from curation.captioner import HUGGINGFACE, load_captioner
from curation.config import parse_config
from curation.images import StripTooLong, check_strip, decode
from curation.measure import Measuring
from curation.pool import list_shards
from curation.store import Unit
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_signals import measure_alone

ORIENTATION = 0x0112  # the EXIF tag


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def bomb(side: int = 30_000) -> bytes:
    """A whole black PNG of side x side pixels, 2.7 GB as RGB, in half a megabyte."""
    packer, rows = zlib.compressobj(1), bytes(100 * (1 + side // 8))  # a bit a pixel, so that it is made at once
    data = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oddities() -> dict[str, tuple[str, bytes]]:
    """name -> (extension, bytes) of pictures of 90 x 60 stored pixels."""
    rng = np.random.default_rng(0)
    base = Image.open(io.BytesIO(picture(1, (90, 60), "PNG")))
    frames = [Image.open(io.BytesIO(picture(n, (90, 60), "PNG"))) for n in (1, 2, 3)]
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (60, 90), np.uint8)))
    sixteen = Image.fromarray(rng.integers(0, 2**16, (60, 90), np.uint16))
    rotated = Image.Exif()
    rotated[ORIENTATION] = 6  # to be shown as 60 x 90
    moving = {"save_all": True, "append_images": frames[1:], "duration": 40, "loop": 0}
    return {
        "cmyk": ("jpg", saved(base.convert("CMYK"), "JPEG")),
        "grey": ("jpg", saved(base.convert("L"), "JPEG")),
        "sixteen": ("png", saved(sixteen, "PNG")),
        "palette": ("png", saved(base.convert("P"), "PNG")),
        "transparent palette": ("png", saved(base.convert("P"), "PNG", transparency=3)),
        "one bit": ("png", saved(base.convert("1"), "PNG")),
        "alpha": ("webp", saved(alpha, "WEBP")),
        "grey alpha": ("png", saved(alpha.convert("LA"), "PNG")),
        "animated gif": ("gif", saved(frames[0], "GIF", **moving)),
        "animated webp": ("webp", saved(frames[0], "WEBP", lossless=True, **moving)),
        "animated png": ("png", saved(frames[0], "PNG", **moving)),
        "rotated": ("jpg", saved(base, "JPEG", exif=rotated)),
        "float": ("tiff", saved(Image.fromarray(rng.random((60, 90), np.float32)), "TIFF")),
        "lying name": ("jpg", saved(base, "PNG")),
        "rest missing": ("png", saved(base, "PNG")[:-40]),
        "empty": ("jpg", b""),
        "no picture": ("webp", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "bomb": ("png", bomb()),
        "postscript": ("jpg", saved(base, "EPS")),
        "portable": ("png", saved(base, "PPM")),
    }


BROKEN = {
    "rest missing": "image_decode",
    "empty": "image_decode",
    "no picture": "image_decode",
    "bomb": "decompression_bomb",
    "postscript": "image_unknown_format",
    "portable": "image_unknown_format",
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, tuple[str, bytes]]:
    return oddities()


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, tuple[str, bytes]], tiny_clip: tuple[Path, Path]
) -> dict[str, dict[str, object]]:
    """By name, what every signal that looks at pixels measured."""
    folder = tmp_path_factory.mktemp("odd")
    samples = {}
    for name, (extension, data) in pictures.items():
        rest = sample(len(samples))
        del rest["jpg"]
        samples[name.replace(" ", "_")] = {extension: data, **rest}
    write_tar(folder / "pool" / "0.tar", samples)
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    signals = {name: {"kind": name} for name in ("image", "exposure", "fingerprints")} | {"clip_score": clip}
    config = parse_config({"signals": signals})
    shard = list_shards([str(folder / "pool")])[0]
    unit = Unit(shard=shard, number=0, rows=len(samples))
    signal_set = store.open_set(folder / "store", config.signals, 1000, [unit])
    Measuring(signals=config.signals, signal_set=signal_set)()(unit)
    return {row["key"].replace("_", " "): row for row in pq.read_table(signal_set.path(unit)).to_pylist()}


def test_each_has_pixels_or_a_reason(rows: dict[str, dict[str, object]]) -> None:
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == BROKEN
    for name, row in rows.items():
        if name not in BROKEN:
            assert (row["width"], row["height"]) == (90, 60), name
            assert -1 <= row["clip_score"] <= 1 and 0 <= row["luminance"] <= 1 and row["phash"] is not None, name


def test_pixels_are_pillows_first_frame_unturned(pictures: dict[str, tuple[str, bytes]]) -> None:
    for name, (_, data) in pictures.items():
        if name not in BROKEN:
            image, _, error = decode(data)
            with Image.open(io.BytesIO(data)) as expected:
                assert error is None and image is not None
                assert (image.size, image.mode) == (expected.size, expected.mode), name
                assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes(), name


def test_rotation_is_left_to_the_reader_as_open_clip_leaves_it(
    rows: dict[str, dict[str, object]], pictures: dict[str, tuple[str, bytes]], tiny_clip: tuple[Path, Path]
) -> None:
    """The score is of the stored pixels: what open_clip's loader feeds a model that trains on the shard."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip[0].stem, pretrained=str(tiny_clip[1]))
    model.eval()
    tokens = open_clip.get_tokenizer(tiny_clip[0].stem)([str(rows["rotated"]["caption"])])
    with torch.no_grad(), Image.open(io.BytesIO(pictures["rotated"][1])) as image:
        turned = image.transpose(Image.Transpose.ROTATE_270)
        scores = []
        for one in (image, turned):
            pair = model.encode_image(preprocess(one)[None], normalize=True), model.encode_text(tokens, normalize=True)
            scores.append(float((pair[0] * pair[1]).sum()))
    assert rows["rotated"]["clip_score"] == pytest.approx(scores[0], abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "JPEG2000"])
def test_the_formats_of_the_web_are_opened(kind: str) -> None:
    image, _, error = decode(saved(Image.open(io.BytesIO(picture(1, (64, 64), "PNG"))), kind))
    assert error is None and image is not None and image.size == (64, 64)


def test_a_bomb_costs_no_memory(pictures: dict[str, tuple[str, bytes]]) -> None:
    data = pictures["bomb"][1]
    assert len(data) < 1 << 20
    tracemalloc.start()
    assert decode(data)[2] == "decompression_bomb"
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_strip_is_not_enlarged_to_gigabytes(
    size: tuple[int, int], tiny_clip: tuple[Path, Path], blip: Path, tmp_path: Path
) -> None:
    """A transform that brings the shorter edge to 64 pixels would make 6,400,000 of the longer one."""
    strip = Image.new("RGB", size, (200, 30, 40))
    members = sample(0)
    del members["jpg"]
    write_tar(tmp_path / "pool" / "0.tar", {"strip": {"png": saved(strip, "PNG"), **members}, "sound": sample(1)})
    clip = {"kind": "clip", "model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    rows = measure_alone(tmp_path / "pool", tmp_path / "store", {"clip_score": clip})
    assert [row["error"] for row in rows] == ["signal_failed", None]
    recaption = {"kind": "recaption", "model": str(blip), "clip": clip["model"], "clip_pretrained": clip["pretrained"]}
    rows = measure_alone(tmp_path / "pool", tmp_path / "store", {"again": recaption})
    assert [row["error"] for row in rows] == ["signal_failed", None]
    shortest = shutil.copytree(blip, tmp_path / "shortest")
    BlipImageProcessor(size={"shortest_edge": 64}).save_pretrained(shortest)
    with pytest.raises(StripTooLong, match=r"\d+ x \d+ would be resized to \d+ x \d+, more than 89478485 pixels"):
        load_captioner(HUGGINGFACE, str(shortest)).pixels(strip)


def test_what_a_strip_may_be() -> None:
    check_strip(Image.new("1", (1_700, 1)), (224, 224))  # 224 x 380,800
    with pytest.raises(StripTooLong):
        check_strip(Image.new("1", (1, 1_800)), (224, 224))  # 224 x 403,200


def test_a_gif_cannot_ask_for_a_canvas_of_gigabytes() -> None:
    """Pillow makes it while it opens the file, where the first frame exceeds the picture and is disposed of."""
    control, frame = b"!\xf9\x04\x08\0\0\0\0", b",\0\0\0\0\xff\xff\xff\xff\0"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(b"GIF89a\1\0\1\0\0\0\0" + control + frame + b"\2\0;")[2] == "decompression_bomb"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_memory_that_runs_out_is_not_the_pictures_fault(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else stand in the signal store for ever."""

    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", full)
    with pytest.raises(MemoryError):
        decode(picture(1, kind=kind))
