"""What the embedded pool's pictures show: scenes of one to four things, drawn from a world with a long tail.

A scene is a small frozen record: things with shape, colour, texture and size,
where they lie, the backdrop and the light. The painter (`curation.drawing`)
and the captions (`curation.wording`) both read this record, so that truth is
never inferred from pixels. Sizes and distances are chosen so that a person,
and a small vision transformer, can still name everything at 64 x 64 pixels.

`random.Random` (of a `hash64`) makes the draws: for single numbers it is ten
times faster than a numpy generator, and a scene needs about sixty.
"""

import math
from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from random import Random

from curation.hashing import hash64

SHAPES = (
    "ball", "cube", "cone", "cylinder", "ring", "star", "heart", "crescent",
    "cross", "diamond", "arrow", "flower", "mushroom", "fish", "house", "hourglass",
)  # fmt: skip
COLOURS = {
    "red": (218, 28, 36),
    "orange": (250, 138, 16),
    "yellow": (250, 220, 38),
    "green": (34, 152, 54),
    "turquoise": (38, 200, 196),
    "blue": (34, 76, 216),
    "purple": (128, 44, 176),
    "pink": (250, 128, 184),
    "brown": (108, 66, 36),
    "white": (248, 248, 246),
    "black": (24, 24, 27),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "outlined")
RADII = {"small": (0.12, 0.145), "medium": (0.165, 0.20), "large": (0.23, 0.28)}
"""Radius of a thing as a share of the picture's shorter side."""

CONCEPTS = tuple(sorted(product(SHAPES, COLOURS, TEXTURES), key=lambda concept: hash64("concept", *concept)))
"""Every (shape, colour, texture), most frequent first; the order belongs to the world, not to a seed."""

TONES = {
    "light gray": (206, 207, 209),
    "dark gray": (74, 75, 78),
    "sandy": (220, 198, 158),
    "pale blue": (168, 194, 220),
    "pale green": (182, 208, 172),
    "navy": (30, 40, 82),
    "cream": (240, 232, 208),
    "olive": (112, 116, 84),
    "slate": (104, 122, 140),
}
"""Colours of backdrops: muted, so that no thing's colour is mistaken for them."""

BACKDROPS = ("plain", "gradient", "cloudy", "horizon", "tiled", "boards", "grainy")
DIRECTIONS = {
    "left": (-1.0, -0.2),
    "right": (1.0, -0.2),
    "above": (0.0, -1.0),
    "upper left": (-0.7, -0.7),
    "upper right": (0.7, -0.7),
}
"""Where the light comes from: unit-like vectors in picture coordinates (y down)."""

BRIGHTNESS = {"dim": 0.72, "even": 0.95, "bright": 1.0}
_COUNTS = ((1, 0.07), (2, 0.43), (3, 0.38), (4, 0.12))
_SIZES = {1: (0.2, 0.4, 0.4), 2: (0.3, 0.35, 0.35), 3: (0.32, 0.45, 0.23), 4: (0.38, 0.5, 0.12)}
_FLATTEN = 8  # Zipf-Mandelbrot's shift: the most frequent concept stays near 2.5 % of all things


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object: its concept, and where and how it is drawn (pixels; `turn` in radians, `phase` in [0, 1))."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    turn: float
    phase: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture before it is painted. `things` run from the farthest to the nearest."""

    width: int
    height: int
    things: tuple[Thing, ...]
    backdrop: str
    tone: str
    second_tone: str
    direction: str
    brightness: str
    grain: int  # seed of the backdrop's own noise


@lru_cache(maxsize=8)
def _cumulative(tail: float) -> list[float]:
    return list(accumulate((rank + _FLATTEN) ** -tail for rank in range(1, len(CONCEPTS) + 1)))


def sample_concept(random: Random, tail: float) -> tuple[str, str, str]:
    """A (shape, colour, texture) by p(rank) ~ (rank + 8)^-tail; 0 is uniform, 1 is Zipf's law."""
    cumulative = _cumulative(tail)
    return CONCEPTS[min(bisect(cumulative, random.random() * cumulative[-1]), len(CONCEPTS) - 1)]


def usual_size(random: Random) -> tuple[int, int]:
    """Width and height in pixels: shorter side 208-360 (smaller ones more often), aspect 0.6-1.7."""
    short = 208 + int(152 * random.random() ** 2)
    draw = random.random()
    if draw < 0.25:
        return short, short
    aspect = random.choice((4 / 3, 3 / 2, 5 / 4)) if draw < 0.6 else random.uniform(1.0, 1.69)
    long = int(short * aspect)
    return (long, short) if random.random() < 0.6 else (short, min(long, int(short / 0.605)))


def small_size(random: Random) -> tuple[int, int]:
    """Width and height of a thumbnail: shorter side 24-120."""
    short = random.randint(24, 120)
    long = int(short * random.uniform(1.0, 1.6))
    return (long, short) if random.random() < 0.5 else (short, long)


def long_size(random: Random) -> tuple[int, int]:
    """Width and height of a banner: aspect 3.2-6, shorter side large enough to pass a rule on size."""
    short = random.randint(204, 224)
    long = int(short * random.uniform(3.22, 6.0))
    return (long, short) if random.random() < 0.8 else (short, long)


def _place(random: Random, radii: list[float], width: int, height: int) -> list[tuple[float, float]] | None:
    """Centres without crowding, or None where these radii do not fit."""
    short = min(width, height)
    # A centre crop must not lose things, so that they keep to the middle of all but banners.
    span = 1.25 * short if max(width, height) <= 2 * short else max(width, height)
    half = [min(side, span) / 2 for side in (width, height)]
    touching = len(radii) > 1 and random.random() < 0.16
    centres: list[tuple[float, float]] = []
    for k, r in enumerate(radii):
        reach = [h - 1.06 * r - 1 for h in half]
        for _ in range(30):
            if touching and k == 1:
                angle, distance = random.uniform(0, math.tau), random.uniform(0.66, 0.8) * (radii[0] + r)
                x, y = centres[0][0] + distance * math.cos(angle), centres[0][1] + distance * math.sin(angle)
                if abs(x - width / 2) > reach[0] or abs(y - height / 2) > reach[1]:
                    continue
            else:
                x = width / 2 + random.uniform(-1, 1) * reach[0]
                y = height / 2 + random.uniform(-1, 1) * reach[1]
            others = centres[2:] if touching and k == 1 else centres
            if all(math.hypot(x - a, y - b) >= 0.98 * (r + radii[i]) for i, (a, b) in enumerate(others)):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def _tones(random: Random, colours: list[str]) -> tuple[str, str]:
    """Two backdrop tones that stand apart from every thing's colour."""

    def distance(tone: str) -> float:
        return min(math.dist(TONES[tone], COLOURS[colour]) for colour in colours)

    fitting = [tone for tone in TONES if distance(tone) >= 100]
    if len(fitting) < 2:
        fitting = sorted(TONES, key=distance)[-2:]
    first = random.choice(fitting)
    return first, random.choice([tone for tone in fitting if tone != first])


def sample_scene(random: Random, *, tail: float, width: int, height: int, count: int | None = None) -> Scene:
    """A scene of `count` things (1-4, mostly 2-3 where None) in a picture of `width` x `height` pixels."""
    if count is None:
        (count,) = random.choices([n for n, _ in _COUNTS], [weight for _, weight in _COUNTS])
    concepts = [sample_concept(random, tail) for _ in range(count)]
    sizes = random.choices(list(RADII), _SIZES[count], k=count)
    if count > 1 and random.random() < 0.08:  # twins, so that captions count
        concepts[1], sizes[1] = concepts[0], sizes[0]
    radii = [random.uniform(*RADII[size]) * min(width, height) for size in sizes]
    while (centres := _place(random, radii, width, height)) is None:
        radii = [0.95 * r for r in radii]
    things = tuple(
        Thing(
            shape=shape, colour=colour, texture=texture, size=size, x=x, y=y, radius=radius,
            turn=random.uniform(-math.pi, math.pi) if shape == "arrow" else random.uniform(-0.22, 0.22),
            phase=random.random(),
        )
        for (shape, colour, texture), size, (x, y), radius in zip(concepts, sizes, centres, radii, strict=True)
    )  # fmt: skip
    tone, second = _tones(random, [thing.colour for thing in things])
    return Scene(
        width=width, height=height, things=things, backdrop=random.choice(BACKDROPS), tone=tone, second_tone=second,
        direction=random.choice(list(DIRECTIONS)), brightness=random.choices(list(BRIGHTNESS), (0.25, 0.5, 0.25))[0],
        grain=random.getrandbits(32),
    )  # fmt: skip
