"""Pictures for training: decoded scaled, cropped and resized in one step, moved by draws of (seed, epoch, uid).

JPEGs that are twice the model's size or more are scaled while they are decoded,
in the DCT, to what still covers it; Pillow takes over from simplejpeg for
whatever that refuses (CMYK, PNG, WebP, ...). Never for measuring: the pixels
differ by a few levels from those of an unscaled decode. Decoders and resizing
release the GIL.

Models that take pictures of any shape ("fit") are graded with just the tensors
that they are trained with, so theirs are decoded unscaled, and by what grades.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance

from curation.errors import UserError
from curation.images import decode as decode_whole
from curation.images import formats

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
HOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Side of the model's input, its statistics, and how pictures are brought to it.

    resize_mode: "squash" keeps the whole picture, "shortest" its centre square, "fit" the whole with its aspect, whose
    longest side is `size` at most (0 = any) · interpolation: bicubic or bilinear ·
    patches: those of the ViT · keep: how many of them a training step sees (FLIP, arXiv 2212.00794); 0 = all ·
    grid: (rows, columns) of patches that regions are weights over ·
    raw: the family makes its tensors of pictures and texts itself, by `extra`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str = "squash"
    interpolation: str = "bicubic"
    patches: int = 0
    keep: int = 0
    grid: tuple[int, int] = (0, 0)
    raw: bool = False

    @classmethod
    def of_vit(cls, grid: Sequence[int], dropped: float, **settings: Any) -> "ImageSpec":
        """Of a tower that drops a share of its patches, rows and columns `grid`, rounded as open_clip does."""
        if not 0 <= dropped < 1:
            raise UserError(f"patch_dropout: {dropped} is no share of patches; give one from 0 to below 1")
        if not dropped:
            return cls(**settings)
        patches = int(np.prod(grid))
        return cls(**settings, patches=patches, keep=max(1, int(patches * (1 - dropped))))


def decode(payload: bytes, side: int, resize_mode: str, box: Box = WHOLE, interpolation: str = "bicubic") -> np.ndarray:
    """uint8 [side, side, 3]: a box of the picture, resized; or [h, w, 3] as `fit` says.

    Args:
        resize_mode: "squash", "fit": the box is of the whole picture; "shortest": of its centre square.
        box: (left, top, right, bottom), in parts of that.

    Raises:
        Exception: Pillow's decoders raise almost anything.
    """
    if resize_mode == "fit":
        whole, _, reason = decode_whole(payload)
        if whole is None:
            raise ValueError(reason)
        return np.asarray(fit(whole.convert("RGB"), side, box, interpolation))
    wide, high = (math.ceil(side / (box[i + 2] - box[i])) for i in (0, 1))
    if resize_mode == "shortest":
        wide = high = max(wide, high)
    image = Image.fromarray(pixels) if (pixels := _jpeg(payload, wide, high)) is not None else None
    if image is None:
        opened = Image.open(io.BytesIO(payload), formats=formats())
        opened.draft("RGB", (wide, high))
        image = opened.convert("RGB")
    left, top, w, h = 0.0, 0.0, float(image.width), float(image.height)
    if resize_mode == "shortest":
        left, top, w, h = (w - min(w, h)) / 2, (h - min(w, h)) / 2, min(w, h), min(w, h)
    edges = (left + box[0] * w, top + box[1] * h, left + box[2] * w, top + box[3] * h)
    return _resized(image, side, edges, interpolation)


def _jpeg(payload: bytes, wide: int, high: int) -> np.ndarray | None:
    """uint8 [h, w, 3] of at least this size where the picture has it; None where simplejpeg refuses it."""
    if payload[:3] != b"\xff\xd8\xff":
        return None
    try:
        # A half or less: what lies between is slower than an unscaled decode, and sharper than its resizing.
        return simplejpeg.decode_jpeg(payload, "RGB", min_width=wide, min_height=high, min_factor=2)
    except ValueError:
        return None


def cut(pixels: np.ndarray, size: int, resize_mode: str, box: Box, interpolation: str = "bicubic") -> np.ndarray:
    """A box of a picture that `decode` gave whole: uint8 [S, S, 3] -> [size, size, 3], or as `fit` says."""
    image = Image.fromarray(pixels)
    if resize_mode == "fit":
        return np.asarray(fit(image, size, box, interpolation))
    left, top, right, bottom = (edge * pixels.shape[0] for edge in box)
    return _resized(image, size, (left, top, right, bottom), interpolation)


def fit(image: Image.Image, longest: int | None, box: Box = WHOLE, interpolation: str = "bicubic") -> Image.Image:
    """A box of a picture with its aspect, at the scale at which the whole is at most `longest` pixels long.

    It is never enlarged, and a whole picture that is no longer, or has no limit (None, 0), is left as it is: doing it
    twice changes nothing. The scale is the whole's, so that things in a crop are as large as grading shows them.
    """
    scale = min(1.0, longest / max(image.size)) if longest else 1.0
    if scale == 1.0 and box == WHOLE:
        return image
    left, right = (edge * image.width for edge in box[::2])
    top, bottom = (edge * image.height for edge in box[1::2])
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return image.resize(size, HOW[interpolation], box=(left, top, right, bottom))


def _resized(image: Image.Image, side: int, box: Box, interpolation: str) -> np.ndarray:
    if image.size != (side, side) or box != (0, 0, side, side):
        image = image.resize((side, side), HOW[interpolation], box=box)
    return np.asarray(image)


def draw_box(rng: np.random.Generator, low: float, high: float) -> Box:
    """A box of `low`..`high` of the area and an aspect of 3/4..4/3, as far as it fits."""
    area, aspect = rng.uniform(low, high), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = (min(1.0, float(np.sqrt(area * a))) for a in (aspect, 1 / aspect))
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return x, y, x + w, y + h


def jitter(pixels: np.ndarray, strength: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue moved in an order of chance, as torchvision's ColorJitter does.

    strength: of each: factors from 1 - s to 1 + s, the hue by -s to s of its circle. pixels uint8 [S, S, 3].
    """
    image = Image.fromarray(pixels)
    *factors, turn = (rng.uniform(-s, s) for s in strength)
    moves: list[Callable[[Image.Image], Image.Image]] = [
        lambda x: ImageEnhance.Brightness(x).enhance(max(0.0, 1 + factors[0])),
        lambda x: ImageEnhance.Contrast(x).enhance(max(0.0, 1 + factors[1])),
        lambda x: ImageEnhance.Color(x).enhance(max(0.0, 1 + factors[2])),
        lambda x: _turned(x, turn),
    ]
    for number in rng.permutation(4):
        if strength[number]:
            image = moves[number](image)
    return np.asarray(image)


def _turned(image: Image.Image, turn: float) -> Image.Image:
    hue, *rest = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point([(i + int(turn * 255)) % 256 for i in range(256)]), *rest)).convert("RGB")


def grey(pixels: np.ndarray) -> np.ndarray:
    """Without colour: uint8 [S, S, 3]."""
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
