"""The built-in detector of text on pictures: flat letters in a row, found without a deep network.

Painted text is a row of blobs of one ink: each stands out from its
surroundings on all sides with a sharp edge, and neighbours agree in height,
base line, ink and stroke. So, on three sizes of the picture's luma and for ink
darker and lighter than what surrounds it:

1. blobs: pixels that differ from the mean of their 31 x 31 window by more than 0.3 of its deviation, connected;
2. letters: blobs of 8 to 44 pixels in height (the sizes of the picture bring every height there), not cut by the
   border, with enough contrast;
3. rows: letters chained to neighbours that are alike; three at least;
4. a network of six hidden units judges 23 measurements of a row: the log odds that it is text.

The network was fitted by `benchmarks/text_detector.py` on texts painted over
photographs, in fonts and colours drawn at random; the same command measures
recall and false alarms on others. What it misses: single letters, curved or
steeply turned words, handwriting, text of a few pixels' height (which a CLIP at
224 pixels cannot read either). A deep one finds more on real scenes; name it as
the `detector` of a recipe where that matters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

LONGEST = 640  # pixels of the largest size that is looked at; smaller pictures are enlarged, at most twice
WINDOW = 31
MIN_CONTRAST = 14.0  # levels of 255
HEIGHTS = (8, 44)
PADDING = 0.12  # of a row's height, on every side: commas and the soft edge of letters


@dataclass(frozen=True, slots=True)
class Letters:
    """Blobs that may be letters, each array [n]; places in pixels of the size looked at, levels in 0..255."""

    x0: np.ndarray
    y0: np.ndarray
    x1: np.ndarray
    y1: np.ndarray
    area: np.ndarray
    border: np.ndarray  # pixels of the blob that touch its outside
    level: np.ndarray  # mean inside
    spread: np.ndarray  # deviation inside
    extreme: np.ndarray  # the level inside that is farthest from the surroundings
    red: np.ndarray  # means inside of red - luma, blue - luma
    blue: np.ndarray
    contrast: np.ndarray  # of the mean inside to the mean of what lies three pixels outside
    outside_spread: np.ndarray
    sharpness: np.ndarray  # mean gradient on the border
    sharpness_spread: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Letters":
        return Letters(*(getattr(self, name)[chosen] for name in self.__slots__))

    @property
    def width(self) -> np.ndarray:
        return self.x1 - self.x0

    @property
    def height(self) -> np.ndarray:
        return self.y1 - self.y0

    @property
    def stroke(self) -> np.ndarray:
        """Thickness of the lines that the blob is drawn with."""
        return 2 * self.area / np.maximum(self.border, 1)

    @property
    def fill(self) -> np.ndarray:
        return self.area / (self.width * self.height)


def detect(image: Image.Image) -> np.ndarray:
    """Boxes of rows of text: float32 [n, 4], x0 y0 x1 y1 in the picture's pixels, the surest first.

    A row that lies half on a surer one of its height becomes one box with it; one of another height is left out.
    """
    boxes, features = candidates(image)
    odds = JUDGE.log_odds(features)
    kept: list[np.ndarray] = []
    for box in boxes[np.argsort(-odds, kind="stable")[: int((odds > 0).sum())]]:
        place = next((i for i, other in enumerate(kept) if _covered(box, other) >= 0.5), None)
        if place is None:
            kept.append(box)
        elif 0.6 < (box[3] - box[1]) / (kept[place][3] - kept[place][1]) < 1.7:
            low, high = np.minimum(box[:2], kept[place][:2]), np.maximum(box[2:], kept[place][2:])
            kept[place] = np.concatenate([low, high])
    found = np.array(kept, np.float32).reshape(-1, 4)
    pad = PADDING * (found[:, 3] - found[:, 1])
    found += np.stack([-pad, -pad, pad, pad], axis=1)
    return np.clip(found, 0, np.array([*image.size, *image.size], np.float32))


def candidates(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Every row of three letters or more: (boxes float64 [n, 4], measurements float64 [n, len(FEATURES)])."""
    picture = image.convert("RGB")
    boxes, features = [], []
    whole = min(2.0, LONGEST / max(picture.size))
    for share in (1.0, 0.5, 0.25):
        size = [max(round(side * whole * share), 1) for side in picture.size]
        if min(size) < WINDOW:
            break
        small = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        pixels = np.asarray(small.convert("L"), np.float32)
        back = np.array([picture.width / size[0], picture.height / size[1]] * 2)
        for letters in _letters(pixels, np.asarray(small)):
            for row in _rows(letters):
                members = letters[row]
                x0, y0, x1, y1 = members.x0.min(), members.y0.min(), members.x1.max(), members.y1.max()
                boxes.append(np.array([x0, y0, x1, y1]) * back)
                features.append(_features(members))
    return np.array(boxes).reshape(-1, 4), np.array(features).reshape(-1, len(FEATURES))


@dataclass(frozen=True, slots=True)
class Judge:
    """A network of one hidden layer: rows [features, 2 + units] of centre, spread and weights; offset and outer
    [units]; bias."""

    rows: np.ndarray
    offset: np.ndarray
    outer: np.ndarray
    bias: float

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """That rows of these measurements [n, features] are text: float64 [n]."""
        z = np.clip((features - self.rows[:, 0]) / self.rows[:, 1], -4, 4)
        return np.tanh(z @ self.rows[:, 2:] + self.offset) @ self.outer + self.bias


def _covered(box: np.ndarray, other: np.ndarray) -> float:
    """Share of the smaller of two boxes that the other covers."""
    low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
    smaller = min(float(np.prod(b[2:] - b[:2])) for b in (box, other))
    return float(np.prod(np.maximum(high - low, 0))) / smaller


def _letters(pixels: np.ndarray, colours: np.ndarray) -> list[Letters]:
    """Letters lighter and letters darker than their surroundings, in a float32 [H, W] luma."""
    mean = ndimage.uniform_filter(pixels, WINDOW)
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(pixels * pixels, WINDOW) - mean * mean, 0))
    least = np.maximum(0.3 * deviation, MIN_CONTRAST)
    gradient = np.hypot(ndimage.sobel(pixels, 0), ndimage.sobel(pixels, 1)) / 8
    found = [_blobs(sign * pixels, sign * (pixels - mean) > least, gradient, colours) for sign in (1, -1)]
    return [letters for letters in found if letters is not None]


def _blobs(pixels: np.ndarray, ink: np.ndarray, gradient: np.ndarray, colours: np.ndarray) -> Letters | None:
    labels, n = ndimage.label(ink)
    area = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    sides = [(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labels)]
    x0, y0, x1, y1 = np.array(sides, np.int64).reshape(-1, 4).T
    tall, wide = y1 - y0, x1 - x0
    chosen = (tall >= HEIGHTS[0]) & (tall <= HEIGHTS[1]) & (wide >= 2) & (wide < 6 * tall) & (area >= 16)
    chosen &= (x0 > 0) & (y0 > 0) & (x1 < ink.shape[1]) & (y1 < ink.shape[0])
    k = int(chosen.sum())
    if k < 3:
        return None
    number = np.full(n + 1, -1)
    number[1:][chosen] = np.arange(k)
    own = number[labels.ravel()]  # [H * W], which letter, -1 where none
    inside = np.flatnonzero(own >= 0)
    level, spread = _moments(own[inside], pixels.ravel()[inside], k)
    extreme = np.full(k, -np.inf)
    np.maximum.at(extreme, own[inside], pixels.ravel()[inside])
    red, blue = (
        np.bincount(own[inside], colours[..., c].ravel()[inside], k) / area[chosen] - np.abs(level) for c in (0, 2)
    )
    width = ink.shape[1]
    flat = ink.ravel()
    # No letter touches the picture's border, so its pixels have all four neighbours.
    border = inside[~(flat[inside - 1] & flat[inside + 1] & flat[inside - width] & flat[inside + width])]
    sharpness, sharpness_spread = _moments(own[border], gradient.ravel()[border], k)
    rows, columns = np.divmod(border, width)
    around, which = [], []
    for down, right in ((0, 3), (0, -3), (3, 0), (-3, 0)):
        there = np.clip(rows + down, 0, len(ink) - 1) * width + np.clip(columns + right, 0, width - 1)
        outside = ~flat[there]
        around.append(pixels.ravel()[there[outside]])
        which.append(own[border[outside]])
    ground, outside_spread = _moments(np.concatenate(which), np.concatenate(around), k)
    letters = Letters(
        x0[chosen], y0[chosen], x1[chosen], y1[chosen], area[chosen], np.bincount(own[border], minlength=k),
        level, spread, extreme, red, blue, np.abs(level - ground), outside_spread, sharpness, sharpness_spread,
    )  # fmt: skip
    plausible = (letters.contrast > 18) & (letters.fill > 0.12) & (letters.fill < 0.95)
    plausible &= (letters.stroke < 0.55 * letters.height) & (letters.sharpness > 0.2 * letters.contrast)
    return letters[plausible]


def _moments(group: np.ndarray, values: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the values of each group: float64 [groups] each; 0 of an empty one."""
    count = np.maximum(np.bincount(group, minlength=groups), 1)
    mean = np.bincount(group, values, groups) / count
    squares = np.bincount(group, values.astype(np.float64) ** 2, groups) / count
    return mean, np.sqrt(np.maximum(squares - mean * mean, 0))


def _rows(c: Letters) -> list[np.ndarray]:
    """Chains of at least three letters, as places in `c`: each is near the next one and alike."""

    def apart(values: np.ndarray) -> np.ndarray:
        return np.abs(values[:, None] - values[None])

    def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.minimum(values[:, None], values[None]), np.maximum(values[:, None], values[None])

    lower, higher = extremes(c.height)
    thin, thick = extremes(c.stroke)
    fainter, _ = extremes(c.contrast)
    (left, right), (top, bottom) = (extremes(s)[1] for s in (c.x0, c.y0)), (extremes(s)[0] for s in (c.x1, c.y1))
    gap, overlap = left - top, bottom - right
    alike = (gap < higher) & (gap > -0.3 * lower) & (overlap > 0.55 * lower) & (higher < 2.1 * lower)
    alike &= np.minimum(apart(c.y1), apart(c.y0)) < 0.22 * higher + 1  # a common base line, or a common top
    alike &= (apart(c.level) < 0.35 * fainter + 6) & (thick < 2.2 * thin + 0.5)
    _, chain = connected_components(coo_matrix(alike), directed=False)
    sizes = np.bincount(chain)
    return [np.flatnonzero(chain == number) for number in np.flatnonzero(sizes >= 3)]


def _tilt(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope of the median line through the points (Theil-Sen), and how far each lies off it."""
    i, j = np.triu_indices(len(x), 1)
    across = x[j] - x[i]
    slopes = (y[j] - y[i])[across != 0] / across[across != 0]
    slope = float(np.median(slopes)) if len(slopes) else 0.0
    rest = y - slope * x
    return slope, np.abs(rest - np.median(rest))


def _features(c: Letters) -> list[float]:
    """What a row is judged by, in the order of `FEATURES`."""
    x, height, width = (c.x0 + c.x1) / 2, c.height, c.width
    tall, contrast = np.median(height), np.median(c.contrast)
    slope, off_base = _tilt(x, c.y1)
    _, off_top = _tilt(x, c.y0)
    shape = np.log(width / height)
    values: list[Any] = [
        np.log(len(x)),
        np.minimum(off_base / tall, 0.5).mean(),
        (off_base < 0.1 * tall).mean(),
        np.minimum(off_top / tall, 0.5).mean(),
        abs(slope),
        np.log((c.x1.max() - c.x0.min()) / (c.y1.max() - c.y0.min())),
        c.level.std() / contrast,
        c.extreme.std() / contrast,
        np.hypot(c.red.std(), c.blue.std()) / contrast,
        (c.spread / c.contrast).mean(),
        (c.outside_spread / c.contrast).mean(),
        (c.sharpness / c.contrast).mean(),
        (c.sharpness_spread / c.sharpness).mean(),
        np.log(contrast),
        np.log(c.stroke).std(),
        (c.stroke / height).mean(),
        shape.mean(),
        shape.std(),
        c.fill.mean(),
        c.fill.std(),
        np.log(height).std(),
        np.log(c.border / (width + height)).mean(),
        np.log(tall),
    ]
    return values


# What is measured of a row: (centre, spread, weight into each unit); as benchmarks/text_detector.py prints them.
FEATURES: dict[str, tuple[float, ...]] = {
    "letters": (1.4119, 0.4191, 0.357, 0.102, -0.596, 0.002, -0.323, 0.539),
    "base_off": (0.1, 0.0863, 0.107, -0.094, 0.087, -0.196, 0.142, 0.095),
    "base_near": (0.6948, 0.2596, 0.07, -0.004, -0.101, -0.102, -0.002, 0.197),
    "top_off": (0.1059, 0.0847, 0.017, -0.005, 0.183, -0.083, 0.172, -0.014),
    "slope": (0.1251, 0.1527, 0.198, -0.592, -0.127, -0.513, 0.082, 0.278),
    "elongation": (0.9972, 0.5469, -0.37, -0.126, -0.026, 0.35, 0.048, -0.292),
    "level_spread": (0.1251, 0.0773, 0.029, 0.04, 0.203, -0.353, 0.188, 0.094),
    "extreme_spread": (0.2099, 0.179, 0.066, -1.215, -0.138, 0.064, 0.373, 0.26),
    "colour_spread": (0.1394, 0.1569, -0.758, 0.155, 0.153, 0.262, -0.114, -0.877),
    "inside_spread": (0.3004, 0.0773, -0.179, 0.451, 0.299, -0.893, -0.143, -0.069),
    "outside_spread": (0.4337, 0.1894, -0.066, -0.52, -0.291, 0.184, 0.117, -0.088),
    "sharpness": (0.4207, 0.0627, 0.012, -0.315, 0.064, 0.163, -0.912, 0.234),
    "sharpness_spread": (0.446, 0.1426, -0.214, -0.698, 0.309, -0.384, 0.318, 0.277),
    "contrast": (3.8408, 0.4773, -0.326, -0.253, -0.468, -0.031, 0.537, -0.034),
    "stroke_spread": (0.1466, 0.0885, -0.007, 0.122, 0.097, -0.334, 0.044, 0.186),
    "stroke": (0.2295, 0.0694, 0.232, -0.396, -0.246, -0.139, 0.304, -0.562),
    "shape": (-0.2234, 0.4394, 1.081, -0.13, -0.033, -0.105, -0.409, -0.549),
    "shape_spread": (0.3304, 0.179, 0.088, 0.038, 0.014, 0.011, -0.076, -0.112),
    "fill": (0.4671, 0.1027, -0.03, -0.15, -0.244, -0.205, -0.028, 0.449),
    "fill_spread": (0.0832, 0.0424, 0.01, -0.02, -0.158, -0.012, 0.161, -0.029),
    "height_spread": (0.2363, 0.1161, -0.209, -0.015, 0.426, 0.155, 0.205, -0.244),
    "outline": (0.5865, 0.1935, -0.445, 0.388, -0.515, 0.041, -0.198, 0.329),
    "height": (2.794, 0.3834, 0.029, -0.577, 0.239, 0.283, -0.154, 0.042),
}
OFFSET = (-0.562, -2.122, -0.082, -2.116, -2.32, -2.062)
OUTER = (-1.939, 2.761, -2.155, 2.006, 2.127, -2.016)
BIAS = 0.169
JUDGE = Judge(np.array(list(FEATURES.values())), np.array(OFFSET), np.array(OUTER), BIAS)
