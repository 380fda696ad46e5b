"""Where a picture shows a text: the cosine of each patch with it, laid over the picture as colour.

    gemsmith heatmap --checkpoint RUN/export --image dog.jpg --text "a dog" --out dog.png

The colours run from the lowest cosine of this picture to its highest, which the
bar below names: a map shows where, and its numbers how much. Between the patches'
centres it is interpolated; nothing else is smoothed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curation.errors import UserError
from curation.images import formats

SIDE = 448
"""Pixels that the shorter side is enlarged to, where it has less."""
BAR = 46


def heat_map(checkpoint: Path, image: Path, text: str, out: Path) -> np.ndarray:
    """Write the PNG; the cosines, float32 [h, w].

    Raises:
        UserError: no such picture or none that can be read, an empty text, a model without a map, or no room for `out`.
    """
    from training.inference import load

    if not text.strip():
        raise UserError("--text: is empty; say what to look for")
    try:
        with Image.open(image, formats=formats()) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything
        raise UserError(f"--image {image}: cannot be read ({type(error).__name__}); name a picture") from None
    model: Any = load(checkpoint)
    if not model.can_regions:
        raise UserError(f"--checkpoint {checkpoint}: has no map of patches in the texts' space; name one of mmgem")
    cosines = model.heat_map(picture, text)
    drawn = draw(picture, cosines, text, model.preprocess["resize_mode"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(out, "PNG")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a PNG that can") from None
    return cosines


def draw(picture: Image.Image, cosines: np.ndarray, text: str, resize_mode: str) -> Image.Image:
    """The picture (its centre square, where the model sees that alone) under its map [h, w], above a bar."""
    from matplotlib import colormaps

    if resize_mode == "shortest":
        side = min(picture.size)
        left, top = ((length - side) / 2 for length in picture.size)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    scale = max(1.0, SIDE / min(picture.size))
    size = round(picture.width * scale), round(picture.height * scale)
    low, high = float(cosines.min()), float(cosines.max())
    map_ = Image.fromarray((cosines.astype(np.float32) - low) / max(high - low, 1e-9))
    heat = np.asarray(map_.resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    turbo = colormaps["turbo"]
    grey = np.asarray(picture.resize(size, Image.Resampling.BICUBIC).convert("L"), np.float64)[..., None] / 255
    mixed = 0.5 * turbo(heat)[..., :3] + 0.5 * grey
    sheet = Image.new("RGB", (size[0], size[1] + BAR), "white")
    sheet.paste(Image.fromarray((255 * mixed).round().astype(np.uint8)))
    bar = turbo(np.linspace(0, 1, size[0]))[None, :, :3].repeat(12, 0)
    sheet.paste(Image.fromarray((255 * bar).round().astype(np.uint8)), (0, size[1] + 4))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    below = size[1] + BAR - 6
    pen.text((4, below), f"{low:.3f}", "black", font, "ls")
    pen.text((size[0] - 4, below), f"{high:.3f}", "black", font, "rs")
    room = size[0] - 130
    label = text
    while font.getlength(label) > room and len(label) > 4:
        label = f"{label[:-4]}..."
    pen.text((size[0] / 2, below), label, "black", font, "ms")
    return sheet
