"""What people would write under a scene: English captions and phrases for single things.

A caption is put together as people do it: the things in some order, with a
relation that holds, an opening or none, then the backdrop or the light or
neither. Attributes are left out now and then, colours and shapes have
synonyms, twins are counted. Nearly every thing is named with colour and shape,
because a caption has to pick its picture out of thousands. Every statement is
read off the scene, so that a clean caption is never wrong.
"""

from itertools import chain, pairwise, repeat
from random import Random

from curation.scenes import Scene, Thing

SHAPE_WORDS = {
    "ball": ("sphere",),
    "cube": ("block", "box"),
    "cylinder": ("drum",),
    "ring": ("hoop",),
    "crescent": ("crescent moon", "moon"),
    "cross": ("plus sign",),
    "diamond": ("rhombus",),
    "flower": ("blossom",),
    "mushroom": ("toadstool",),
    "house": ("hut",),
}
COLOUR_WORDS = {
    "red": ("bright red", "scarlet"),
    "turquoise": ("teal", "cyan"),
    "green": ("grass green",),
    "purple": ("violet",),
    "brown": ("dark brown",),
    "pink": ("light pink",),
    "white": ("snow white",),
    "black": ("jet black",),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered", "checkered", "checked"),
    "outlined": ("outlined", "outlined", "bordered"),
}
TEXTURE_TAILS = {
    "striped": ("with stripes", "with broad stripes"),
    "dotted": ("with dots", "covered in dots"),
    "checkered": ("with a checkered pattern", "with checks"),
    "outlined": ("with an outline", "with a thick border"),
}
WORDS = (6, 20)
NUMBERS = {2: "two", 3: "three", 4: "four"}

LISTS = {
    1: ("{0}", "just {0}", "a single thing: {0}", "nothing but {0}", "{0} by itself", "{0} all alone"),
    2: ("{0} and {1}", "{0} next to {1}", "{0} beside {1}", "{0} together with {1}", "{0} with {1}",
        "{0}, and also {1}", "two things, {0} and {1}", "both {0} and {1}", "{0} plus {1}", "{0} as well as {1}"),
    3: ("{0}, {1} and {2}", "{0}, {1}, and {2}", "{0} with {1} and {2}", "{0}, also {1} and {2}",
        "three things: {0}, {1} and {2}", "{0} and {1}, and then {2}", "{0} together with {1} and {2}"),
    4: ("{0}, {1}, {2} and {3}", "{0}, {1}, {2}, and {3}", "{0} and {1} with {2} and {3}",
        "four things: {0}, {1}, {2} and {3}", "{0}, {1} and {2}, plus {3}"),
}  # fmt: skip
RELATIONS = {
    "left": ("{0} to the left of {1}", "{0} left of {1}", "{1} to the right of {0}", "{1} on the right of {0}",
             "{0} on the left and {1} on the right", "{1} right of {0}", "{0} on the left side of {1}"),
    "above": ("{0} above {1}", "{1} below {0}", "{1} underneath {0}", "{0} over {1}", "{1} under {0}",
              "{0} at the top and {1} at the bottom", "{0} higher up than {1}"),
    "front": ("{0} in front of {1}", "{1} behind {0}", "{0} overlapping {1}", "{1} partly hidden by {0}",
              "{0} covering part of {1}"),
}  # fmt: skip
ROWS = {
    "left": ("from left to right {0}", "in a row from the left: {0}", "{0}, from left to right"),
    "above": ("from top to bottom {0}", "{0}, from top to bottom", "one above the other: {0}"),
}
OPENINGS = (
    "a picture of {}", "an image of {}", "a photo of {}", "a drawing of {}", "a rendering of {}", "a scene with {}",
    "a view of {}", "the picture shows {}", "this picture shows {}", "here you can see {}", "we see {}",
    "this is {}", "you can see {}", "the image shows {}", "in this picture, {}", "look at {}", "a shot of {}",
)  # fmt: skip
BACKDROP_WORDS = {
    "plain": ("on a {0} background", "against a plain {0} wall", "in front of a {0} wall", "on {0} paper"),
    "gradient": ("on a {0} background that fades to {1}", "on a background fading from {0} to {1}",
                 "against a {0} and {1} gradient"),
    "cloudy": ("on a cloudy {0} background", "in front of a misty {0} backdrop", "against a blurry {0} background"),
    "horizon": ("on a {0} floor in front of a {1} wall", "on {0} ground under a {1} sky", "on a {0} table"),
    "tiled": ("on {0} tiles", "in front of a tiled {0} wall", "on a tiled {0} floor"),
    "boards": ("on {0} boards", "against a wall of {0} boards", "on {0} planks"),
    "grainy": ("on a grainy {0} background", "on rough {0} paper", "against a rough {0} wall"),
}  # fmt: skip
LIGHT_WORDS = ("lit from the {0}", "with light from the {0}", "with the light coming from the {0}", "lit from {0}")
BRIGHTNESS_WORDS = {
    "dim": ("in dim light", "in low light", "in weak light"),
    "even": ("in soft light", "in even light"),
    "bright": ("in bright light", "in strong light", "brightly lit"),
}


def _word(random: Random, plain: str, others: dict[str, tuple[str, ...]], share: float) -> str:
    return random.choice(others[plain]) if plain in others and random.random() < share else plain


def article(words: str) -> str:
    """The words with "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeiou' or words.startswith('hour') else 'a'} {words}"


def plural(noun: str) -> str:
    """The plural of a shape's word: "crosses", "boxes", "fish"."""
    if noun == "fish":
        return noun
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def describe(random: Random, thing: Thing, *, thrift: int = 0, count: int = 1) -> str:
    """A noun phrase with its article or number; with more `thrift` (0-3) more attributes are left out."""
    words = []
    if thing.size in SIZE_WORDS and random.random() < (0.6, 0.45, 0.25, 0.0)[thrift]:
        words.append(random.choice(SIZE_WORDS[thing.size]))
    colour = _word(random, thing.colour, COLOUR_WORDS, 0.1 if thrift < 2 else 0.0)
    tail = ""
    attributes = [] if random.random() < 0.03 else [colour]
    share = 0.12 if thing.texture == "plain" else (0.9, 0.88, 0.75, 0.5)[thrift]
    if random.random() < share:
        if thing.texture in TEXTURE_TAILS and thrift == 0 and random.random() < 0.1:
            tail = " " + random.choice(TEXTURE_TAILS[thing.texture])
        else:
            attributes.insert(random.random() < 0.3, random.choice(TEXTURE_WORDS[thing.texture]))
    noun = _word(random, thing.shape, SHAPE_WORDS, 0.12)
    words += [*attributes, plural(noun) if count > 1 else noun]
    phrase = " ".join(words) + tail
    return f"{NUMBERS[count]} {phrase}" if count > 1 else article(phrase)


def region_phrase(random: Random, thing: Thing) -> str:
    """One thing with all its attributes in plain words: "a small striped red cone"."""
    size = [random.choice(SIZE_WORDS[thing.size])] if thing.size in SIZE_WORDS else []
    texture = [] if thing.texture == "plain" else [thing.texture]
    return article(" ".join([*size, *texture, thing.colour, thing.shape]))


def _relation(a: Thing, b: Thing, *, a_is_nearer: bool) -> tuple[str, bool] | None:
    """A relation that holds, and whether it holds with the two exchanged; None for an unclear one."""
    across, down = b.x - a.x, b.y - a.y
    if across * across + down * down < (0.82 * (a.radius + b.radius)) ** 2:
        return "front", not a_is_nearer
    if abs(across) > 1.3 * abs(down):
        return "left", across < 0
    if abs(down) > 1.3 * abs(across):
        return "above", down < 0
    return None


def _row(things: list[Thing]) -> tuple[str, list[Thing]] | None:
    """Things that stand clearly in a row or a column, in order."""
    for name, axis in (("left", "x"), ("above", "y")):
        ordered = sorted(things, key=lambda thing: getattr(thing, axis))
        if all(getattr(b, axis) - getattr(a, axis) > 0.6 * max(a.radius, b.radius) for a, b in pairwise(ordered)):
            return name, ordered
    return None


def _enumerate(phrases: list[str], random: Random) -> str:
    return random.choice(LISTS[len(phrases)]).format(*phrases) if phrases else ""


def _plain_list(phrases: list[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _body(random: Random, scene: Scene, thrift: int) -> str:
    nearness = {id(thing): k for k, thing in enumerate(scene.things)}
    things = list(scene.things)
    random.shuffle(things)
    # Twins are counted, never told apart.
    groups: dict[tuple[str, str, str, str], list[Thing]] = {}
    for thing in things:
        groups.setdefault((thing.shape, thing.colour, thing.texture, thing.size), []).append(thing)
    if len(groups) < len(things):
        phrases = [describe(random, group[0], thrift=thrift, count=len(group)) for group in groups.values()]
        return phrases[0] if len(phrases) == 1 else _plain_list(phrases)
    if len(things) >= 3 and random.random() < 0.3 and (row := _row(things)):
        name, ordered = row
        return random.choice(ROWS[name]).format(_plain_list([describe(random, t, thrift=thrift) for t in ordered]))
    if len(things) >= 3 and random.random() < 0.06:
        things = things[:-1]  # people overlook things
    phrases = [describe(random, thing, thrift=thrift) for thing in things]
    if len(things) >= 2 and random.random() < 0.6:
        a, b = things[:2]
        found = _relation(a, b, a_is_nearer=nearness[id(a)] > nearness[id(b)])
        if found:
            name, exchanged = found
            pair = random.choice(RELATIONS[name]).format(*(phrases[1::-1] if exchanged else phrases[:2]))
            rest = phrases[2:]
            if not rest:
                return pair
            joined = _plain_list(rest) if len(rest) > 1 else rest[0]
            return random.choice(("{0}, and {1}", "{0}, with {1} nearby", "{1}, and {0}", "{0}, plus {1}")).format(
                pair, joined
            )
    return _enumerate(phrases, random)


def _surroundings(random: Random, scene: Scene, share: float) -> str:
    parts = []
    if random.random() < share:
        backdrop = random.choice(BACKDROP_WORDS[scene.backdrop]).format(scene.tone, scene.second_tone)
        parts.append(" " + backdrop.replace(" a olive", " an olive"))
    if random.random() < share * 0.35:
        if random.random() < 0.5:
            where = scene.direction
            wording = LIGHT_WORDS[3] if where == "above" else random.choice(LIGHT_WORDS[:3])
            parts.append(random.choice((", ", " ")) + wording.format(where))
        else:
            parts.append(random.choice((", ", " ")) + random.choice(BRIGHTNESS_WORDS[scene.brightness]))
    return "".join(parts)


def caption(random: Random, scene: Scene) -> str:
    """A caption of `WORDS` words that is true of the scene."""
    several = len(scene.things) >= 3
    # The first tries may be rich; later ones leave more out, until the caption has a caption's length.
    for thrift in chain((1, 2, 2) if several else (0, 0, 1, 1, 2), repeat(3)):
        body = _body(random, scene, thrift)
        if random.random() < 0.4:
            opening = random.choice(OPENINGS)
            body = opening.format(body)
        elif random.random() < 0.15 and body.startswith(("a ", "an ")):
            body = "there is " + body
        text = body + _surroundings(random, scene, {1: 0.9, 2: 0.5}.get(len(scene.things), 0.35 - 0.1 * thrift))
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            break
    style = random.random()
    if style < 0.5:
        text = text[0].upper() + text[1:]
    return text + "." if 0.25 < style < 0.6 else text
