"""Where a picture has text on it, and the picture without that text: the first half of T-MARS.

T-MARS (Maini et al. 2023, arXiv 2307.03132): a CLIP likes a picture for the
words painted on it, which teaches nothing of what is to be seen. So text is
found, its boxes are filled with their mean colour, and what is left is scored
again: the signal `clip` with `mask_text` does that, with the detector of here.

A picture is looked at once, however many signals ask: each process has one
finder per detector, which remembers the last sample that it saw.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.dotted import function_content, load_function
from curation.signals.interface import Decoded

BUILTIN = "builtin"


@dataclass(frozen=True, kw_only=True)
class TextRegions:
    """Columns `text_boxes` (list<list<float32>>, x0 y0 x1 y1 in pixels of the decoded picture) and `text_area`
    (float32, the share of the picture that they cover).

    `detector`: "builtin" (`curation.text_detector`), or package.module:function, which takes a picture (PIL, in its
    own mode) and returns boxes [n, 4] like these.
    """

    detector: str = BUILTIN
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"text_boxes": pa.list_(pa.list_(pa.float32())), "text_area": pa.float32()}

    def content(self) -> dict[str, Any]:
        return {"detector": detector_content(self.detector)}

    def made_by(self) -> str:
        return detector_name(self.detector)

    def load(self, name: str) -> "TextRegionsMeter":
        return TextRegionsMeter(text_finder(self.detector))


class TextRegionsMeter:
    def __init__(self, finder: "TextFinder") -> None:
        self._finder = finder

    def see(self, sample: Decoded) -> tuple[list[list[float]], float]:
        boxes = self._finder(sample)
        return boxes.tolist(), covered(boxes, sample.image.size)

    def columns(self, seen: Sequence[tuple[list[list[float]], float]]) -> dict[str, pa.Array]:
        boxes, shares = zip(*seen, strict=True)
        return {
            "text_boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32()))),
            "text_area": pa.array(shares, pa.float32()),
        }


class TextFinder:
    """sample -> boxes float32 [n, 4]; asked again of the same sample, it does not look again."""

    def __init__(self, detect: Callable[[Image.Image], Any]) -> None:
        self._detect = detect
        self._last: tuple[Decoded, np.ndarray] | None = None

    def __call__(self, sample: Decoded) -> np.ndarray:
        if self._last is None or self._last[0] is not sample:
            self._last = sample, np.asarray(self._detect(sample.image), np.float32).reshape(-1, 4)
        return self._last[1]


@functools.cache
def text_finder(detector: str) -> TextFinder:
    """The one finder of this detector in this process.

    Raises:
        UserError: the detector cannot be imported.
    """
    if detector == BUILTIN:
        from curation.text_detector import detect

        return TextFinder(detect)
    return TextFinder(load_function("text detector", detector))


def detector_content(detector: str) -> Any:
    """What decides the boxes.

    Raises:
        UserError: the detector's module does not exist.
    """
    return f"{BUILTIN} 1" if detector == BUILTIN else function_content("text detector", detector)


def detector_name(detector: str) -> str:
    """What finds the boxes, as the manifest names it."""
    return "the built-in text detector, in place of FAST" if detector == BUILTIN else detector


def masked(image: Image.Image, boxes: np.ndarray) -> Image.Image:
    """The picture in RGB with each box filled by the mean colour of its pixels."""
    before = np.asarray(image.convert("RGB"))
    after = before.copy()
    for x0, y0, x1, y1 in _pixels(boxes, image.size):
        if x0 < x1 and y0 < y1:
            after[y0:y1, x0:x1] = before[y0:y1, x0:x1].mean(axis=(0, 1)).round()
    return Image.fromarray(after)


def covered(boxes: np.ndarray, size: tuple[int, int]) -> float:
    """The share of a picture of (width, height) that the boxes cover together."""
    inside = np.zeros((size[1], size[0]), bool)
    for x0, y0, x1, y1 in _pixels(boxes, size):
        inside[y0:y1, x0:x1] = True
    return float(inside.mean())


def _pixels(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes as whole pixels: all that they touch, within the picture."""
    outward = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
    return np.clip(outward, 0, [*size, *size]).astype(int)
