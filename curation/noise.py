"""Kinds and rates of noise in the embedded pool, and how each is made.

`KINDS` is the one place for the rates; `CAUGHT_BY` says which filter is meant
to catch which kind, so that a report can hold filters against the truth. What
kind sample i is, and which earlier sample a duplicate copies, follow from the
seed and i alone: any sample can be made without making the others.
"""

from itertools import accumulate
from random import Random

from PIL import Image, ImageDraw, ImageFont

from curation.hashing import hash64

KINDS = {
    "clean": 0.50,
    "swapped": 0.20,  # the caption of another scene
    "boilerplate": 0.05,  # alt text that says nothing of the picture
    "file_name": 0.04,
    "other_language": 0.06,  # a true caption, in another language
    "too_small": 0.03,
    "too_long": 0.02,
    "exact_duplicate": 0.03,  # image bytes and caption of an earlier clean sample
    "near_duplicate": 0.03,  # an earlier clean sample, cropped, resized, encoded again
    "painted": 0.035,  # the caption is painted into the picture of another scene
    "broken": 0.005,  # one of BREAKAGES
}
BREAKAGES = ("truncated_image", "html", "empty_image", "json", "caption_bytes")
CAUGHT_BY = {
    "language": ("other_language",),
    "caption": ("boilerplate", "file_name"),
    "resolution": ("too_small",),
    "aspect": ("too_long",),
    "clip_score": ("swapped", "painted", "boilerplate", "file_name"),
    "duplicates": ("exact_duplicate", "near_duplicate"),
    "errors": ("broken",),
}
"""Filter -> the kinds that it is there for."""

_NAMES, _BOUNDS = list(KINDS), list(accumulate(KINDS.values()))

BOILERPLATE = (
    "image may contain: one or more people and text", "image may contain: indoor", "click to enlarge",
    "click here to view the full size image", "stock photo", "royalty free stock photo of the day", "untitled-{n}",
    "image {n} of {m}", "photo number {n} in the gallery", "download this free wallpaper for your desktop",
    "share this picture on your favorite network", "no description available for this image",
    "thumbnail for the version as of 2014", "buy one get one free only this week", "featured image for the blog post",
    "view all {n} photos in this album", "product image {n}, hover to zoom in", "logo of the company",
    "this image has been removed by its owner", "placeholder image", "slide {n} of the presentation",
    "picture posted by user{n} on our forum", "copyright {m} all rights reserved", "free shipping on orders over ${n}",
)  # fmt: skip
_FILE_NAMES = (
    "IMG_{n:04d}.JPG", "DSC{n:05d}.jpg", "dsc{n:04d}-final.png", "IMG-2019{a:02d}{b:02d}-WA{n:04d}.jpg",
    "P{a:02d}{n:05d}.JPG", "photo_{n}_large.webp", "Screenshot 20{b:02d}-{a:02d}-11 at {a:02d}.41.{b:02d}.png",
    "{h:08x}.jpeg", "image{n}.png", "scan_{n:03d}_v{a}.tif", "banner-{n}x{b}.gif", "final_FINAL_{a}.psd",
    "{h:x}_o.jpg", "PICT{n:04d} copy.jpg",
)  # fmt: skip
_HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>\n<body><h1>Not Found</h1></body></html>\n"


def drawn_kind(stream: str, index: int) -> str:
    """The kind that the dice give sample `index` of a stream (a name that holds the seed)."""
    at = hash64("kind", stream, index) / 2**64 * _BOUNDS[-1]
    return next((name for name, bound in zip(_NAMES, _BOUNDS, strict=True) if at < bound), _NAMES[-1])


def kind_of(stream: str, index: int) -> tuple[str, int | None]:
    """The kind of sample `index`, and which earlier clean sample it copies (None for all but duplicates).

    A duplicate before which there is nothing clean is itself clean.
    """
    kind = drawn_kind(stream, index)
    if not kind.endswith("_duplicate"):
        return kind, None
    # Half of all samples are clean: 64 tries miss with p < 1e-19, except at the very beginning of a pool.
    for attempt in range(64 if index else 0):
        source = hash64("source", stream, index, attempt) % index
        if drawn_kind(stream, source) == "clean":
            return kind, source
    return "clean", None


def boilerplate(random: Random) -> str:
    """Alt text as content systems write it."""
    text = random.choice(BOILERPLATE).format(n=random.randint(2, 99), m=random.randint(100, 2019))
    return text.capitalize() if random.random() < 0.4 else text


def file_name(random: Random) -> str:
    """A file name as a caption."""
    return random.choice(_FILE_NAMES).format(
        n=random.randint(1, 9999), a=random.randint(1, 12), b=random.randint(10, 28), h=random.getrandbits(32)
    )


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Lines of whole words, each at most `width` pixels where a word allows it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def paint_text(random: Random, image: Image.Image, text: str) -> Image.Image:
    """The picture with the text written over it, on a band or with outlined letters; at most 40 % is covered."""
    image = image.copy()
    width, height = image.size
    size = max(11, round(min(width, height) * random.uniform(0.06, 0.09)))
    while True:
        font = ImageFont.load_default(size)
        lines = wrap(text, font, 0.94 * width)
        line_height = round(size * 1.22)
        if line_height * len(lines) <= 0.4 * height or size <= 10:
            break
        size -= 1
    block = line_height * len(lines)
    top = round(random.choice((0.03, 0.5, 0.97)) * max(height - block, 0))
    draw = ImageDraw.Draw(image)
    ink, paper = random.choice((("white", "black"), ("black", "white"), ("yellow", "navy")))
    band = random.random() < 0.6
    if band:
        draw.rectangle((0, top - 2, width, top + block + 2), fill=paper)
    for k, line in enumerate(lines):
        at = ((width - font.getlength(line)) / 2, top + k * line_height)
        draw.text(at, line, fill=ink, font=font, stroke_width=0 if band else 2, stroke_fill=paper)
    return image


def again(random: Random, image: Image.Image, boxes: list[list[float]]) -> tuple[Image.Image, list[list[float]]]:
    """A near duplicate: cropped by at most 3 % a side, resized by 0.75-1.3, up to a tenth lighter or darker.

    The shorter side stays at 204 pixels or more; the boxes move along.
    """
    width, height = image.size
    left, top = (int(random.uniform(0, 0.03) * side) for side in (width, height))
    right, bottom = (side - int(random.uniform(0, 0.03) * side) for side in (width, height))
    scale = max(random.uniform(0.75, 1.3), 204 / min(right - left, bottom - top))
    size = round((right - left) * scale), round((bottom - top) * scale)
    gain = random.uniform(0.9, 1.1)
    image = image.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    image = image.point([min(round(level * gain), 255) for level in range(256)] * 3)
    moved = []
    for x, y, w, h in boxes:
        x0, y0 = max((x - left) * scale, 0.0), max((y - top) * scale, 0.0)
        x1, y1 = min((x + w - left) * scale, float(size[0])), min((y + h - top) * scale, float(size[1]))
        moved.append([round(number, 1) for number in (x0, y0, x1 - x0, y1 - y0)])
    return image, moved


def damage(how: str, image: bytes, text: bytes, meta: bytes) -> tuple[bytes, bytes, bytes]:
    """The members of a sample (image, caption, json) after one of `BREAKAGES`."""
    if how == "truncated_image":
        return image[: len(image) * 2 // 5], text, meta
    if how == "html":
        return _HTML, text, meta
    if how == "empty_image":
        return b"", text, meta
    if how == "json":
        return image, text, meta[: len(meta) // 2]
    return image, text + " at the café".encode("latin-1"), meta
