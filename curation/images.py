"""Decoding: every image fully and unscaled, by the decoder that open_clip's users compare with.

Pillow is the reference. Colour JPEGs go through simplejpeg, whose unscaled
pixels are identical and which is faster; scaled decoding would move CLIPScores
by several thousandths. The image keeps its own mode (palette, alpha, 16 bit)
because a model's transform may resize before it converts to RGB.

Only the formats of the web are opened, whatever a file is called: of the others
that Pillow knows some run programs (Ghostscript, for PostScript) or have
decoders that nobody tries to break.
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit (a quarter of a gigabyte of RGB); there only a warning up to twice as many
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
WEB = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "JPEG2000", "HEIF")

# The limit is held below, before anything is decoded. Pillow's own refusal stays for what it makes while it opens a
# file, such as the canvas of a GIF's first frame: a few bytes may ask for gigabytes there.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class StripTooLong(ValueError):
    """A picture so narrow that a transform would make gigabytes of it; the message gives the sizes."""


def check_strip(image: Image.Image, wanted: tuple[int, int]) -> None:
    """Transforms that bring the shorter edge to a model's size enlarge the longer one with it: 1 x 100,000 pixels, of
    a few bytes, would become 224 x 22,400,000.

    Args:
        wanted: width and height that the picture is made to cover.

    Raises:
        StripTooLong: it would have more than MAX_PIXELS.
    """
    scale = max(want / side for want, side in zip(wanted, image.size, strict=True))
    width, height = (round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise StripTooLong(
            f"a picture of {image.width} x {image.height} would be resized to {width} x {height}, "
            f"more than {MAX_PIXELS} pixels"
        )


def decode(raw: bytes) -> tuple[Image.Image | None, str, str | None]:
    """Decode the first frame of an image.

    Returns:
        (image, format, error): the image is loaded and in its own mode, or
        None where error is "image_decode", "decompression_bomb" or, for what
        begins as a picture of another format, "image_unknown_format"; the format
        is jpg, png, webp, ... or "" where it was not recognised or not opened.

    Raises:
        MemoryError: there is no room for its pixels now.
    """
    import simplejpeg

    if raw[:3] == b"\xff\xd8\xff":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(raw)
            if height * width > MAX_PIXELS:
                return None, "jpg", "decompression_bomb"
            if colorspace == "YCbCr":
                return Image.fromarray(simplejpeg.decode_jpeg(raw, "RGB")), "jpg", None
        except ValueError:
            pass  # Pillow decides whether it can be read at all
    kind = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw), formats=formats()) as image:
                kind = FORMATS.get(image.format or "", (image.format or "").lower())
                if image.width * image.height > MAX_PIXELS:
                    return None, kind, "decompression_bomb"
                several = getattr(image, "n_frames", 1) > 1  # before `load`: looking for frames undoes it
                image.load()
                return image.copy() if several else image, kind, None
    except Image.DecompressionBombError:
        return None, kind, "decompression_bomb"
    except MemoryError:  # of the machine, not of the picture, and what is measured is kept
        raise
    except UnidentifiedImageError:
        return None, kind, "image_unknown_format" if _is_other(raw[:16]) else "image_decode"
    except Exception:
        return None, kind, "image_decode"


def formats() -> list[str]:
    """Those of WEB that Pillow has here, by its names: HEIF, for one, where a plugin was registered."""
    Image.init()
    return [name for name in WEB if name in Image.OPEN]


def _is_other(start: bytes) -> bool:
    """Whether a file begins like one of the formats that Pillow has and that are not opened."""
    for name, (_, accept) in Image.OPEN.items():
        try:
            found = name not in WEB and accept is not None and accept(start)
        except Exception:  # of a start that is too short
            continue
        if found and not isinstance(found, str):  # which is a warning
            return True
    return False
