"""One sample of the embedded pool, made from (world, index) alone.

A world is a seed and a law: the noisy pool with its long tail, a clean set, or
single things for classification. Worlds of one seed share nothing, so that a
pool and the held-out scenes that grade it may carry the same seed.
"""

import hashlib
import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

from PIL import Image

from curation.drawing import render
from curation.hashing import hash64
from curation.languages import translate
from curation.noise import BREAKAGES, again, boilerplate, damage, file_name, kind_of, paint_text
from curation.scenes import COLOURS, SHAPES, Scene, long_size, sample_scene, small_size, usual_size
from curation.wording import caption, region_phrase

PARAPHRASES = 5
CLASSES = {"classification": ("shape", SHAPES), "colours": ("colour", tuple(COLOURS))}
"""By law: what the classes of single things are."""
_SITES = ("img.example.com", "cdn.example.net", "static.example.org", "photos.example.com", "media.example.net")


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that a sample depends on beside its index. `law`: pool, clean or one of CLASSES."""

    seed: int
    law: str
    tail: float

    @cached_property
    def stream(self) -> str:
        return f"{self.law}/{self.seed}"

    def random(self, use: str, index: int, k: int = 0) -> Random:
        return Random(hash64("synth", self.stream, use, index, k))

    def uid(self, index: int) -> str:
        """32 hex digits."""
        return "".join(f"{hash64('uid', self.stream, index, half):016x}" for half in (0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Specimen:
    """A sample and the truth about it. `boxes` are (x, y, width, height) in pixels, one per thing of the scene."""

    uid: str
    kind: str
    detail: str  # the language, or what is broken; else empty
    extension: str
    image: bytes
    width: int
    height: int
    captions: tuple[str, ...]
    true_caption: str
    scene: Scene
    boxes: list[list[float]]
    phrases: list[str]
    url: str
    duplicate_of: str | None = None


def encode(
    random: Random, image: Image.Image, *, extension: str | None = None, worse: bool = False
) -> tuple[str, bytes]:
    """(extension, bytes): mostly JPEG, some WebP and PNG, at the encoders' fast settings; `worse` for recompression."""
    extension = extension or random.choices(("jpg", "webp", "png"), (0.8, 0.12, 0.08))[0]
    quality = random.randint(50, 72) if worse else random.randint(75, 95)
    target = io.BytesIO()
    if extension == "jpg":
        image.save(target, "JPEG", quality=quality)
    elif extension == "webp":
        image.save(target, "WEBP", quality=quality, method=0)
    else:
        image.save(target, "PNG", compress_level=1)
    return extension, target.getvalue()


def _scene(world: World, use: str, index: int, kind: str = "clean") -> Scene:
    random = world.random(use, index)
    size = {"too_small": small_size, "too_long": long_size}.get(kind, usual_size)
    width, height = size(random)
    if world.law not in CLASSES:
        return sample_scene(random, tail=world.tail, width=width, height=height)
    # Classes take turns, so that every class is equally frequent.
    kind, classes = CLASSES[world.law]
    wanted = classes[index % len(classes)]
    scene = sample_scene(random, tail=world.tail, width=width, height=height, count=1)
    if kind == "shape":
        return replace(scene, things=(replace(scene.things[0], shape=wanted),))
    while scene.things[0].colour != wanted:  # which the backdrop stands apart from
        scene = sample_scene(random, tail=world.tail, width=width, height=height, count=1)
    return scene


def _caption(world: World, scene: Scene, use: str, index: int, k: int = 0) -> str:
    return caption(world.random(f"caption of {use}", index, k), scene)


def _paraphrases(world: World, scene: Scene, index: int) -> tuple[str, ...]:
    """Five different captions of one scene, the first of which is the caption."""
    found: dict[str, None] = {}
    k = 0
    while len(found) < PARAPHRASES:
        found[_caption(world, scene, "scene", index, k)] = None
        k += 1
    return tuple(found)


def make(world: World, index: int) -> Specimen:
    """Sample `index` of a world."""
    kind, source = kind_of(world.stream, index) if world.law == "pool" else ("clean", None)
    random = world.random("noise", index)
    uid = world.uid(index)
    extra = f"{hash64('url', world.stream, index):x}"
    url = f"https://{random.choice(_SITES)}/{extra[:2]}/{extra[2:12]}"
    if kind == "exact_duplicate" and source is not None:
        original = make(world, source)
        return replace(original, uid=uid, kind=kind, url=f"{url}.{original.extension}", duplicate_of=original.uid)
    shown = index if source is None else source
    scene = _scene(world, "scene", shown, kind)
    image, boxes = render(scene)
    true_caption = _caption(world, scene, "scene", shown)
    captions: tuple[str, ...] = (true_caption,)
    detail, extension = "", None
    if kind == "near_duplicate":
        image, boxes = again(random, image, boxes)
        if random.random() < 0.4:
            captions = (_caption(world, scene, "scene", shown, 1),)
    elif kind in ("swapped", "painted"):
        captions = (_caption(world, _scene(world, "other", index), "other", index),)
        if kind == "painted":
            image = paint_text(random, image, captions[0])
    elif kind == "boilerplate":
        captions = (boilerplate(random),)
    elif kind == "file_name":
        captions = (file_name(random),)
    elif kind == "other_language":
        detail, text = translate(random, scene)
        captions = (text,)
    elif kind == "broken":
        detail, extension = random.choice(BREAKAGES), "jpg"
    elif world.law != "pool":
        captions = _paraphrases(world, scene, index)
    extension, content = encode(
        world.random("encode", index), image, extension=extension, worse=kind == "near_duplicate"
    )
    return Specimen(
        uid=uid, kind=kind, detail=detail, extension=extension, image=content, width=image.width, height=image.height,
        captions=captions, true_caption=true_caption, scene=scene, boxes=boxes,
        phrases=[region_phrase(world.random("region", shown, k), thing) for k, thing in enumerate(scene.things)],
        url=f"{url}.{extension}", duplicate_of=None if source is None else world.uid(source),
    )  # fmt: skip


def metadata(world: World, specimen: Specimen, key: str) -> dict[str, Any]:
    """The json member as img2dataset writes it; clean sets add `captions` and `regions`, which web pools lack."""
    size = {"width": specimen.width, "height": specimen.height}
    meta: dict[str, Any] = {
        "uid": specimen.uid,
        "caption": specimen.captions[0],
        "url": specimen.url,
        "key": key,
        "status": "success",
        "error_message": None,
        **size,
        **{f"original_{name}": number for name, number in size.items()},
        "exif": "{}",
        "sha256": hashlib.sha256(specimen.image).hexdigest(),
    }
    if world.law != "pool":
        meta["captions"] = list(specimen.captions)
        meta["regions"] = [
            {"bbox_xywh": box, "name": phrase} for box, phrase in zip(specimen.boxes, specimen.phrases, strict=True)
        ]
    return meta


def members(world: World, specimen: Specimen, key: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a sample by extension, and its metadata (whole, also where the json member is broken)."""
    if world.law in CLASSES:
        kind, classes = CLASSES[world.law]
        label = str(classes.index(getattr(specimen.scene.things[0], kind)))
        return {specimen.extension: specimen.image, "cls": label.encode()}, metadata(world, specimen, key)
    image, text = specimen.image, specimen.captions[0].encode()
    if specimen.kind != "broken":
        meta = metadata(world, specimen, key)
        return {specimen.extension: image, "txt": text, "json": json.dumps(meta).encode()}, meta
    image, text, _ = damage(specimen.detail, image, text, b"")
    damaged = text.decode("utf-8", "replace")
    meta = metadata(world, replace(specimen, image=image, captions=(damaged,)), key)
    *_, raw = damage(specimen.detail, image, text, json.dumps(meta).encode())
    return {specimen.extension: image, "txt": text, "json": raw}, meta
