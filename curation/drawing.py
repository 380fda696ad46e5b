"""Paints scenes: signed distances inside each thing's own box, backdrops from a few stretched pixels.

Speed decides the form. A distance field gives smooth edges, soft shadow and
bevel without supersampling, and is evaluated on the thing's box alone (float32,
a tenth of the picture). Backdrops are made at a few pixels and stretched by
Pillow, so that no full-resolution pass in floating point is needed at all.

Shapes live in coordinates (u, v) of about [-1, 1], v downwards; a distance is
in the same unit, negative inside.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from curation.scenes import BRIGHTNESS, COLOURS, DIRECTIONS, TONES, Scene, Thing

Field = np.ndarray
"""float32 [rows, columns] (or broadcastable to it)."""


def _disc(u: Field, v: Field, x: float, y: float, r: float) -> Field:
    return np.sqrt(np.square(u - x) + np.square(v - y)) - r


def _ellipse(u: Field, v: Field, y: float, a: float, b: float) -> Field:
    """Near its edge alone a distance; enough for smooth edges."""
    return (np.sqrt(np.square(u / a) + np.square((v - y) / b)) - 1) * min(a, b)


def _box(u: Field, v: Field, y: float, a: float, b: float) -> Field:
    return np.maximum(np.abs(u) - a, np.abs(v - y) - b)


def _arc(u: Field, a: float) -> Field:
    """Upper half of an ellipse of half width `a` and height 1, as a function of u."""
    return np.sqrt(np.maximum(1 - np.square(u / a), 0))


def _roof(u: Field, v: Field, top: float, bottom: float, a: float) -> Field:
    """A triangle with its tip at (0, top) and a base of half width `a` at v = bottom."""
    slope = (bottom - top) / a
    return np.maximum(v - bottom, (np.abs(u) * slope + top - v) / math.hypot(1, slope))


def _star(u: Field, v: Field) -> Field:
    angle = np.arctan2(u, -v)
    fold = np.abs((angle + math.pi / 5) % (math.tau / 5) - math.pi / 5)
    r = np.sqrt(u * u + v * v)
    # The edge runs from the tip (1, 0) to the inner corner at 36 degrees, in the folded wedge.
    inner, wedge = 0.45, math.pi / 5
    ex, ey = inner * math.cos(wedge) - 1.02, inner * math.sin(wedge)
    return ((r * np.cos(fold) - 1.02) * ey - r * np.sin(fold) * ex) / math.hypot(ex, ey)


def _heart(u: Field, v: Field) -> Field:
    """Two discs over a rounded tip."""
    x = np.abs(u)
    lobes = _disc(x, v, 0.45, -0.32, 0.5)
    lower = np.maximum(np.maximum((x * 0.76 + (v - 0.92) * 0.65), -0.32 - v), x - 0.96)
    return np.minimum(lobes, lower)


def _arrow(u: Field, v: Field) -> Field:
    return np.minimum(_box(u, v, 0.45, 0.25, 0.5), _roof(u, v, -0.98, 0.05, 0.82))


def _flower(u: Field, v: Field) -> Field:
    r = np.sqrt(u * u + v * v)
    return (r - 0.72 - 0.26 * np.cos(5 * np.arctan2(u, -v))) * 0.75


def _mushroom(u: Field, v: Field) -> Field:
    cap = np.maximum(_ellipse(u, v, 0.1, 0.98, 0.95), v - 0.1)
    return np.minimum(cap, _box(u, v, 0.45, 0.28, 0.45))


def _fish(u: Field, v: Field) -> Field:
    body = (np.sqrt(np.square((u + 0.22) / 0.76) + np.square(v / 0.56)) - 1) * 0.56
    tail = np.maximum(np.abs(v) * 0.8 - (u - 0.22) * 0.75, u - 0.98)
    return np.minimum(body, tail * 0.8)


def _cube(u: Field, v: Field) -> Field:
    x = np.abs(u)
    return np.maximum(x - 0.82, x * 0.5 + np.abs(v) * 0.87 - 0.83)


SHAPE: dict[str, Callable[[Field, Field], Field]] = {
    "ball": lambda u, v: _disc(u, v, 0, 0, 0.92),
    "cube": _cube,
    "cone": lambda u, v: np.maximum(_roof(u, v, -1.0, 1.6, 1.26), v - 0.56 - 0.3 * _arc(u, 0.8)),
    "cylinder": lambda u, v: np.maximum(np.abs(u) - 0.6, np.abs(v) - 0.68 - 0.25 * _arc(u, 0.6)),
    "ring": lambda u, v: np.abs(_disc(u, v, 0, 0, 0.68)) - 0.27,
    "star": _star,
    "heart": _heart,
    "crescent": lambda u, v: np.maximum(_disc(u, v, 0, 0, 0.98), -_disc(u, v, 0.5, -0.12, 0.8)),
    "cross": lambda u, v: np.minimum(_box(u, v, 0, 0.95, 0.32), _box(u, v, 0, 0.32, 0.95)),
    "diamond": lambda u, v: (np.abs(u) + np.abs(v) * 0.7 - 0.7) / 1.22,
    "arrow": _arrow,
    "flower": _flower,
    "mushroom": _mushroom,
    "fish": _fish,
    "house": lambda u, v: np.maximum(np.maximum(np.abs(u) - 0.76, v - 0.88), _roof(u, v, -0.98, 1.6, 2.2)),
    "hourglass": lambda u, v: np.maximum(np.abs(v) - 0.95, (np.abs(u) - 0.74 * np.abs(v) - 0.07) * 0.8),
}


def _body(shape: str, u: Field, v: Field, lx: float, ly: float) -> Field:
    """Brightness over a shape that has depth (around 1); flat ones get a slope towards the light."""
    if shape == "ball":
        z = np.sqrt(np.maximum(1 - (u * u + v * v) * 1.15, 0))
        facing = np.maximum(0.62 * (u * lx + v * ly) + 0.78 * z, 0)
        return 0.5 + 0.58 * facing + 0.5 * facing**12
    if shape == "cube":
        top = np.abs(u) * 0.577 + v < 0
        left, right = (0.92, 0.62) if lx <= 0 else (0.62, 0.92)
        return np.where(top, 1.18, np.where(u < 0, left, right)).astype(np.float32)
    if shape == "cylinder":
        side = 0.92 + 0.3 * u * lx - 0.35 * u * u
        return np.where(_ellipse(u, v, -0.68, 0.6, 0.25) < 0, np.float32(1.25), side)
    if shape == "cone":
        return 0.95 + 0.45 * np.clip(u / np.maximum(0.48 * (v + 1.02), 0.05), -1, 1) * (lx or -0.4)
    return 1 + 0.14 * (u * lx + v * ly)


def _pattern(texture: str, d: Field, u: Field, v: Field, thing: Thing) -> Field | None:
    """Share of the second colour, 0-1; None for plain."""
    sharp = thing.radius * 0.9  # one pixel of softness
    if texture == "striped":
        angle = thing.phase * math.pi
        across = (u * math.cos(angle) + v * math.sin(angle)) * (1 / 0.58) + thing.phase * 7
        return np.clip((np.abs(across - np.floor(across) - 0.5) - 0.31) * sharp * 0.58 + 0.5, 0, 1)
    if texture == "dotted":
        cells = [w * (1 / 0.54) + thing.phase * k for w, k in ((u, 5), (v, 3))]
        a, b = (c - np.floor(c) - 0.5 for c in cells)
        return np.clip((0.33 - np.sqrt(a * a + b * b)) * sharp * 0.54 + 0.5, 0, 1)
    if texture == "checkered":
        cells = [np.floor(w * (1 / 0.4) + thing.phase * k) for w, k in ((u, 5), (v, 3))]
        return ((cells[0] + cells[1]) % 2).astype(np.float32)
    if texture == "outlined":
        return np.clip((d + 0.17) * thing.radius + 0.5, 0, 1)
    return None


def _second_colour(colour: str, texture: str) -> np.ndarray:
    """The pattern's colour: near enough that the named colour rules, far enough to be seen."""
    base = np.array(COLOURS[colour], np.float32)
    if colour in ("white", "black"):  # gray for both: stripes of the other one would make them the same picture
        return np.full(3, 128, np.float32)
    if texture == "outlined" or colour == "yellow":
        return base * 0.3
    return base * 0.18 + 255 * 0.82


def _paint(canvas: np.ndarray, thing: Thing, light: tuple[float, float], brightness: float) -> list[float]:
    """Draw one thing and its shadow into uint8 [H, W, 3]; returns its box (x, y, width, height) in pixels."""
    height, width, _ = canvas.shape
    r = thing.radius
    reach = 1.1 * r + max(0.42 * r, 3)
    x0, y0 = math.floor(thing.x - reach), math.floor(thing.y - reach)
    side = math.ceil(2 * reach) + 1
    across = ((np.arange(side, dtype=np.float32) + (x0 + 0.5 - thing.x)) / r)[None, :]
    down = ((np.arange(side, dtype=np.float32) + (y0 + 0.5 - thing.y)) / r)[:, None]
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    u, v = across * cos + down * sin, down * cos - across * sin
    lx, ly = light[0] * cos + light[1] * sin, light[1] * cos - light[0] * sin

    d = SHAPE[thing.shape](u, v).astype(np.float32, copy=False)
    alpha = np.clip(0.5 - d * r, 0, 1)
    # The field seen from a step towards the light: outside there while inside here is a lit edge,
    # inside there while outside here is shadow.
    step = (-round(light[1] * 0.16 * r) or (1 if light[1] < 0 else 0), -round(light[0] * 0.16 * r))
    towards = np.roll(d, step, (0, 1))
    shadow = 0.4 * np.clip(0.55 - towards * 3.2, 0, 1)
    shade = _body(thing.shape, u, v, lx, ly)
    if thing.shape != "ball":
        shade = shade + 1.1 * np.clip(towards - d, -0.2, 0.2) * np.clip(1 + d * 5, 0, 1)

    rows, columns = np.flatnonzero(alpha.max(1) > 0.5), np.flatnonzero(alpha.max(0) > 0.5)
    left, top = max(x0 + columns[0], 0), max(y0 + rows[0], 0)
    right, bottom = min(x0 + columns[-1] + 1, width), min(y0 + rows[-1] + 1, height)

    inside = (slice(max(-y0, 0), min(side, height - y0)), slice(max(-x0, 0), min(side, width - x0)))
    d, u, v, alpha, shadow = (field[inside] for field in (d, u, v, alpha, shadow))
    shade = np.broadcast_to(shade, (side, side))[inside] * (alpha * brightness)
    base = np.array(COLOURS[thing.colour], np.float32)
    mix = _pattern(thing.texture, d, u, v, thing)
    if thing.shape == "flower":
        heart = np.clip((0.26 - np.sqrt(u * u + v * v)) * r, 0, 1) * 0.55
        shade = shade * (1 - heart)
    elif thing.shape == "fish":
        eye = np.clip((0.12 - np.sqrt(np.square(u + 0.58) + np.square(v + 0.14))) * r, 0, 1)
        shade = shade * (1 - 0.8 * eye)
    elif thing.shape == "house":
        door = np.clip(-_box(u, v, 0.56, 0.2, 0.32) * r + 0.5, 0, 1)
        shade = shade * (1 - 0.7 * door)
    second = None if mix is None else (_second_colour(thing.colour, thing.texture) - base)
    keep = (1 - alpha) * (1 - shadow)
    region = canvas[max(y0, 0) : min(y0 + side, height), max(x0, 0) : min(x0 + side, width)]
    for c in range(3):
        colour = base[c] if second is None or mix is None else base[c] + second[c] * mix
        region[..., c] = np.minimum(region[..., c] * keep + colour * shade, 255)
    return [float(left), float(top), float(right - left), float(bottom - top)]


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """int8 noise [1024, 1024, 1] that grainy backdrops cut their piece from."""
    noise = np.random.default_rng(0).normal(0, 9, (1024, 1024, 1))
    return np.clip(noise, -25, 25).astype(np.int8)


def _stretched(small: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    return Image.fromarray(np.clip(small, 0, 255).astype(np.uint8), "RGB").resize(size, how)


def _backdrop(scene: Scene, light: tuple[float, float], brightness: float) -> np.ndarray:
    """The lit picture without things: uint8 [H, W, 3]."""
    size = width, height = scene.width, scene.height
    tone, second = (np.array(TONES[name], np.float32) for name in (scene.tone, scene.second_tone))
    generator = np.random.default_rng(scene.grain)

    def fall(cells: int) -> Field:
        """How the light falls off over the picture: float32 [cells, cells, 1]."""
        at = np.linspace(-1, 1, cells, dtype=np.float32)
        slope = np.clip(at[None, :] * light[0] + at[:, None] * light[1], -1, 1)
        return (brightness * (0.87 + 0.13 * slope))[..., None]

    # Smooth backdrops are lit at a few pixels, before they are stretched.
    if scene.backdrop in ("plain", "gradient", "cloudy", "grainy"):
        cells = int(generator.integers(5, 9))
        how = Image.Resampling.BICUBIC if scene.backdrop == "cloudy" else Image.Resampling.BILINEAR
        small: Field = np.broadcast_to(tone, (cells, cells, 3))
        if scene.backdrop == "gradient":
            ramp = np.linspace(0, 1, cells, dtype=np.float32).reshape(
                (1, cells, 1) if scene.grain % 2 else (cells, 1, 1)
            )
            small = tone + (second - tone) * ramp
        elif scene.backdrop == "cloudy":
            small = tone + generator.random((cells, cells, 1), np.float32) * 44 - 22
        picture = np.array(_stretched(small * fall(cells), size, how))
        if scene.backdrop == "grainy":
            y, x = generator.integers(0, 1024, 2)
            rows, columns = (np.arange(n) + start for n, start in ((height, y), (width, x)))
            # Tones keep clear of 0 and 255 by more than the noise, so that adding modulo 256 never wraps.
            picture += _grain().take(rows, 0, mode="wrap").take(columns, 1, mode="wrap").view(np.uint8)
        return picture

    # Those with edges are stretched without smoothing, and lit at full size.
    if scene.backdrop == "horizon":
        down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
        line = 0.35 + 0.3 * generator.random()
        small = np.where(down < line, second + down * 20, tone + down * 12 - 10)
    elif scene.backdrop == "tiled":
        tiles = int(generator.integers(5, 9))
        rows = np.arange(max(round(tiles * height / width), 2))
        small = tone + np.add.outer(rows, np.arange(tiles))[..., None] % 2 * 26.0 - 13
    else:
        boards = np.repeat(generator.random((int(generator.integers(5, 9)), 1, 1)) * 26 - 13, 12, 0)
        boards[::12] = -42
        small = tone + boards
    veil = np.repeat(fall(4) * 255, 3, 2)
    edges = _stretched(small, size, Image.Resampling.NEAREST)
    return np.array(ImageChops.multiply(edges, _stretched(veil, size, Image.Resampling.BILINEAR)))


def render(scene: Scene) -> tuple[Image.Image, list[list[float]]]:
    """The picture (RGB) and one box (x, y, width, height; pixels, hidden parts included) per thing, in order."""
    brightness, light = BRIGHTNESS[scene.brightness], DIRECTIONS[scene.direction]
    canvas = _backdrop(scene, light, brightness)
    boxes = [_paint(canvas, thing, light, brightness) for thing in scene.things]
    return Image.fromarray(canvas, "RGB"), boxes
