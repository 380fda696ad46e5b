"""Regions of a picture as weights over a ViT's patches: MM-GEM's PoolAggregator (arXiv 2405.19333, stage 2).

A region's features are a weighted mean of the patches' features, V_R = sum_n w_n V_n,
whatever the region is, so that boxes and masks take one path through the model:

    box    w are RoIAlign's (He et al. 2017, section 3; torchvision's with aligned=True): one bin with as many sampling
           points a side as the map has patches, each read bilinearly. The whole picture's points are the patches'
           centres, so its weights are 1 / N exactly and RoIAlign falls together with stage 1's mean.
    mask   w_n is the area of the mask within patch n, over the mask's.

They are made where the sample is read, of its own numbers alone, and lie in the
chunk as a tensor: no kernel of its own, no atomic sums, the same in every precision.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.errors import UserError
from curation.images import formats

NONE = "region_none"  # said by an empty list, as of one picture in a hundred of COCO: nothing is wrong with it
REASONS = ("region_missing", NONE, "region_broken", "region_outside", "mask_empty")
"""Why a region cannot be used; what the errors below say."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Region:
    """box: (left, top, right, bottom) in pixels of the picture · mask: bool [H, W] of the picture, in place of the
    box where there is one · phrase: what it shows."""

    phrase: str
    box: Box
    mask: np.ndarray | None = None


class Unseen(UserError):
    """The model sees nothing of a region: for the loader, "region_outside"."""


def entries(record: Any) -> list[Any]:
    """The `regions` of a sample's json, unchecked.

    Raises:
        ValueError: "region_missing" where there is no such list, "region_none" where it is empty.
    """
    found = record.get("regions") if isinstance(record, Mapping) else None
    if not isinstance(found, list):
        raise ValueError("region_missing")
    if not found:
        raise ValueError(NONE)
    return found


def size_of(payload: bytes) -> tuple[int, int]:
    """(width, height) by the picture's header."""
    from PIL import Image

    with Image.open(io.BytesIO(payload), formats=formats()) as picture:
        return picture.size


def read_region(entry: Any, width: int, height: int) -> Region:
    """`{"name": phrase, "bbox_xywh": [x, y, w, h]}` in pixels, `"segmentation"` (COCO's polygons or RLE) beside the
    box or in its place.

    Raises:
        ValueError: one of REASONS.
    """
    phrase = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(phrase, str) or not phrase.strip() or not _is_utf8(phrase):
        raise ValueError("region_broken")
    if entry.get("segmentation") is not None:
        mask = _mask(entry["segmentation"], width, height)
        if not mask.any():
            raise ValueError("mask_empty")
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return Region(phrase, tuple(map(float, box)), mask)  # type: ignore[arg-type]
    numbers = entry.get("bbox_xywh")
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(_finite(n) for n in numbers):
        raise ValueError("region_broken")
    x, y, w, h = map(float, numbers)
    if w <= 0 or h <= 0:
        raise ValueError("region_broken")
    box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("region_outside")
    return Region(phrase, box)


def _is_utf8(text: str) -> bool:
    """Whether it has no lone surrogate, which json allows and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


def _mask(segmentation: Any, width: int, height: int) -> np.ndarray:
    """bool [height, width], by COCO's own code."""
    from pycocotools import mask as coco

    try:
        if isinstance(segmentation, Mapping):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError("of another picture")
            packed = isinstance(segmentation["counts"], str)
            rle = dict(segmentation) if packed else coco.frPyObjects(dict(segmentation), height, width)
        else:
            if not segmentation or any(len(p) < 6 or len(p) % 2 or not all(map(_finite, p)) for p in segmentation):
                raise ValueError("no polygons")
            rle = coco.merge(coco.frPyObjects(segmentation, height, width))
        return coco.decode(rle).astype(bool)
    except Exception:  # pycocotools raises almost anything
        raise ValueError("region_broken") from None


def region_weights(
    region: Region, size: tuple[int, int], grid: tuple[int, int], resize_mode: str, flipped: bool = False
) -> np.ndarray:
    """Weights of the patches, row by row: float32 [rows * columns], of sum 1.

    Args:
        size: (width, height) of the picture.
        grid: (rows, columns) of patches.
        resize_mode: "squash": the model sees the whole picture; "shortest": its centre square.
        flipped: left and right are exchanged.

    Raises:
        Unseen: the model sees nothing of it.
        UserError: a box that is none, or a mask of another size than the picture's.
    """
    width, height = size
    left, top, w, h = 0.0, 0.0, float(width), float(height)
    if resize_mode == "shortest":
        left, top, w, h = (w - min(w, h)) / 2, (h - min(w, h)) / 2, min(w, h), min(w, h)
    rows, columns = grid
    if region.mask is not None:
        if (found := np.shape(region.mask)) != (height, width):
            raise UserError(f"region.mask: is {found}, not {(height, width)}; give [height, width] of the picture")
        down = _overlaps(top, top + h, rows, height)
        across = _overlaps(left, left + w, columns, width)
        weights = down @ region.mask.astype(np.float64) @ across.T
    else:
        x0, y0, x1, y1 = region.box
        if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):  # a NaN is in no order
            raise UserError(f"region.box: {region.box} is no box; give (left, top, right, bottom) in pixels")
        span = [((x0 - left) / w, (x1 - left) / w), ((y0 - top) / h, (y1 - top) / h)]
        (x0, x1), (y0, y1) = ((max(a, 0.0), min(b, 1.0)) for a, b in span)
        seen = x0 < x1 and y0 < y1
        weights = np.outer(_aligned(y0, y1, rows), _aligned(x0, x1, columns)) if seen else np.zeros(grid)
    if not weights.any():
        what = f"box: {region.box} shows" if region.mask is None else "mask: shows"
        part = f"pixels {left:g} to {left + w:g} across and {top:g} to {top + h:g} down"
        raise Unseen(f"region.{what} nothing of what the model sees, {part}; give one within it")
    if flipped:
        weights = weights[:, ::-1]
    return (weights / weights.sum()).ravel().astype(np.float32)


def _aligned(low: float, high: float, cells: int) -> np.ndarray:
    """RoIAlign along one side: weights [cells] of the interval [low, high], in parts of the side."""
    points = low * cells - 0.5 + (np.arange(cells) + 0.5) * (high - low)
    points = points.clip(0, cells - 1)
    before = np.floor(points).astype(int)
    share = points - before
    weights = np.zeros(cells)
    np.add.at(weights, before, (1 - share) / cells)
    np.add.at(weights, np.minimum(before + 1, cells - 1), share / cells)
    return weights


def _overlaps(start: float, stop: float, cells: int, pixels: int) -> np.ndarray:
    """Length that cell i of [start, stop] and pixel j have in common: float64 [cells, pixels]."""
    edges = np.linspace(start, stop, cells + 1)[:, None]
    at = np.arange(pixels)[None]
    return (np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at)).clip(0)
