"""The built-in detector of text on pictures: flat letters in a row, found without a trained network.

Painted text is a row of blobs of one ink: each stands out from its
surroundings on all sides with a sharp edge, and neighbours agree in height,
base line, ink and stroke. So, on three sizes of the picture's luma and for ink
darker and lighter than what surrounds it:

1. blobs: pixels that differ from the mean of their 31 x 31 window by more than 0.3 of its deviation, connected;
2. letters: blobs of 8 to 44 pixels in height (the sizes of the picture bring every height there), not cut by the
   border, with enough contrast;
3. rows: letters chained to neighbours that are alike; three at least;
4. a logistic regression on 23 measurements of a row says how sure it is that this is text.

The regression was fitted by `benchmarks/text_detector.py` on texts painted over
photographs, in fonts and colours drawn at random; the same command measures
recall and false alarms on others. What it misses: single letters, curved or
steeply turned words, handwriting, text of a few pixels' height (which a CLIP at
224 pixels cannot read either). A network finds more on real scenes; name one as
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
SURE = -0.5  # log odds from which a row is text: on unseen photographs a tenth of the clean ones has one, or less
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

    Rows that lie on a surer one are left out.
    """
    boxes, features = candidates(image)
    odds = log_odds(features)
    kept: list[np.ndarray] = []
    for place in np.argsort(-odds, kind="stable")[: int((odds > SURE).sum())]:
        if all(_covered(boxes[place], other) < 0.5 for other in kept):
            kept.append(boxes[place])
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


def log_odds(features: np.ndarray) -> np.ndarray:
    """The regression: float64 [n] of measurements [n, len(FEATURES)]."""
    centre, spread, linear, square = np.array(list(FEATURES.values())).T
    z = np.clip((features - centre) / spread, -4, 4)
    return z @ linear + z**2 @ square + BIAS


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
    """What the regression judges a row by, in the order of `FEATURES`."""
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


# What is measured of a row: (centre, spread, weight, weight of the square), as benchmarks/text_detector.py prints them.
FEATURES: dict[str, tuple[float, float, float, float]] = {
    "letters": (1.4097, 0.4179, 0.0806, -0.09),
    "base_off": (0.0981, 0.0851, -0.4158, -0.0043),
    "base_near": (0.7, 0.2567, -0.1171, 0.0173),
    "top_off": (0.1048, 0.0841, -0.1563, -0.0701),
    "slope": (0.1242, 0.153, -1.1463, 0.344),
    "elongation": (0.9964, 0.5501, 0.567, -0.0739),
    "level_spread": (0.125, 0.0778, -0.3296, 0.0865),
    "extreme_spread": (0.2075, 0.1783, -0.6549, 0.2922),
    "colour_spread": (0.1418, 0.1594, 1.0645, -0.2036),
    "inside_spread": (0.3, 0.0775, -0.37, 0.1938),
    "outside_spread": (0.4321, 0.1913, -0.2621, 0.2263),
    "sharpness": (0.4196, 0.0626, -0.857, 0.3252),
    "sharpness_spread": (0.4433, 0.1434, -0.8979, 0.0824),
    "contrast": (3.8407, 0.4857, 1.0996, -0.3669),
    "stroke_spread": (0.1459, 0.0889, -0.3078, 0.1192),
    "stroke": (0.2301, 0.0703, -0.7872, 0.0227),
    "shape": (-0.2323, 0.4384, -0.5832, -0.4489),
    "shape_spread": (0.33, 0.1803, 0.0091, -0.1299),
    "fill": (0.4693, 0.102, 0.4533, -0.234),
    "fill_spread": (0.0834, 0.0424, 0.2544, 0.0224),
    "height_spread": (0.2341, 0.1164, -0.0162, -0.1055),
    "outline": (0.5848, 0.1939, 1.039, -0.1371),
    "height": (2.7954, 0.3843, -0.7728, 0.0553),
}
BIAS = -3.0674
