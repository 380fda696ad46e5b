"""Fits and measures the built-in text detector.

    python -m benchmarks.text_detector [--photos A.tar B.tar ...] --unseen C.tar ...

Texts are painted over photographs in fonts, sizes, inks and ways (on a band,
with an outline, plain) drawn by hash(seed, key); the truth is Pillow's own box
of each line. The fit reads `--photos` and half of the fonts and prints the
table of `curation/text_detector.py`; without it the table in force is measured.
Measured are always `--unseen` photographs, with fonts that the fit did not see:

    found          pictures with a painted text where boxes cover at least 0.5 % (any_found: where there is a box)
    false_alarms   the same of the photographs before they were painted on (which hold real writing, too)
    recall         painted area that the boxes cover; precision: boxes' area that is painted

The network is fitted by L-BFGS from one start: the same table on every run.
"""

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curation import tar, text_detector
from curation.hashing import hash64

FONTS = {
    "fitted": (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf",
        "cmss10.ttf", "",
    ),
    "unseen": (
        "DejaVuSans-Oblique.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono-Bold.ttf",
        "STIXGeneralBol.ttf", "cmr10.ttf",
    ),
}  # fmt: skip
"""matplotlib's fonts; "" is Pillow's own."""
FLAGGED = 0.005  # of the picture's area
TEXT, DOUBT = 0.6, 0.25  # a row with more of its box painted is text, one with less than the second is not


def photographs(paths: Sequence[Path]) -> Iterator[tuple[str, Image.Image, str]]:
    """(key, RGB picture, caption) of every sample of these shards."""
    for path in paths:
        data = tar.open_shard(path)
        for sample in tar.samples(data)[0]:
            read = {e: data[m.offset : m.offset + m.size] for e, m in sample.members.items()}
            picture = next(read[e] for e in tar.IMAGE_EXTENSIONS if e in read)
            yield sample.key, Image.open(io.BytesIO(picture)).convert("RGB"), read["txt"].decode()


def font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    import matplotlib

    if not name:
        return ImageFont.load_default(size)
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def paint(random: Random, image: Image.Image, text: str, fonts: Sequence[str]) -> tuple[Image.Image, np.ndarray]:
    """The picture with two to eight words of the text on it, through a JPEG, and the box of each line [n, 4]."""
    image = image.copy()
    width, height = image.size
    size = max(11, round(min(width, height) * random.uniform(0.05, 0.14)))
    chosen = font(random.choice(fonts), size)
    words = [*text.split(), "for", "sale"][: random.randint(2, 8)]
    lines: list[str] = []
    for word in (w.upper() for w in words) if random.random() < 0.25 else words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and chosen.getlength(longer) < 0.9 * width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if chosen.getlength(line) < width] or ["sale"]
    step = round(size * 1.25)
    lines = lines[: max(1, int(0.6 * height / step))]
    top = random.uniform(0.02, 0.98) * max(height - step * len(lines), 0)
    way = random.choice(("band", "outline", "plain", "plain"))
    ground = np.asarray(image.convert("L"))[int(top) : int(top) + step * len(lines) + 1].mean()
    while True:
        ink, paper = ([random.randrange(256) for _ in range(3)] for _ in range(2))
        if random.random() < 0.5:
            ink = list(random.choice(((255, 255, 255), (0, 0, 0), (255, 255, 0), (255, 0, 0))))
        under = ground if way == "plain" else _luma(paper)
        if abs(_luma(ink) - under) > 70:
            break
    draw = ImageDraw.Draw(image)
    if way == "band":
        draw.rectangle((0, top - 2, width, top + step * len(lines) + 2), fill=tuple(paper))
    boxes = []
    for number, line in enumerate(lines):
        at = (random.uniform(0, width - chosen.getlength(line)), top + number * step)
        outline = 2 if way == "outline" else 0
        draw.text(at, line, fill=tuple(ink), font=chosen, stroke_width=outline, stroke_fill=tuple(paper))
        boxes.append(draw.textbbox(at, line, font=chosen))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=random.randint(70, 95))
    return Image.open(buffer), np.array(boxes)


def _luma(colour: Sequence[int]) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def area(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], true inside any of the boxes."""
    inside = np.zeros((size[1], size[0]), bool)
    for x0, y0, x1, y1 in np.clip(np.round(boxes), 0, None).astype(int):
        inside[y0:y1, x0:x1] = True
    return inside


def gather(photos: Sequence[tuple[str, Image.Image, str]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Measurements of every row on the photographs, painted and not: (float64 [n, F], bool [n] whether it is text)."""
    features, labels = [], []
    for key, photo, caption in photos:
        painted, truth = paint(Random(hash64(seed, key)), photo, caption, FONTS["fitted"])
        for picture, inked in ((painted, area(truth, photo.size)), (photo, area(truth[:0], photo.size))):
            boxes, measured = text_detector.candidates(picture)
            share = [_share(inked, box) for box in boxes]
            clear = [s > TEXT or s < DOUBT for s in share]
            features.append(measured[clear])
            labels.append(np.array(share)[clear] > TEXT)
    return np.concatenate(features), np.concatenate(labels)


def _share(inside: np.ndarray, box: np.ndarray) -> float:
    x0, y0, x1, y1 = np.round(box).astype(int)
    return float(inside[y0:y1, x0:x1].mean())


def fit(features: np.ndarray, labels: np.ndarray, units: int = 6, ridge: float = 3e-4) -> text_detector.Judge:
    """The network of least cross entropy and squared weights that L-BFGS finds from its one fixed start."""
    from scipy.optimize import minimize

    centre, spread = features.mean(axis=0), features.std(axis=0)
    z = np.clip((features - centre) / spread, -4, 4)
    sign = np.where(labels, 1.0, -1.0)
    n, k = z.shape

    def parts(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        inner, rest = flat[: k * units].reshape(k, units), flat[k * units :]
        return inner, rest[:units], rest[units:-1], float(rest[-1])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        inner, offset, outer, bias = parts(flat)
        hidden = np.tanh(z @ inner + offset)  # [n, units]
        margin = sign * (hidden @ outer + bias)
        value = np.logaddexp(0, -margin).mean() + ridge * ((inner**2).sum() + (outer**2).sum())
        slope = -sign / (1 + np.exp(np.clip(margin, -50, 50))) / n
        into = np.outer(slope, outer) * (1 - hidden**2)
        gradient = [(z.T @ into + 2 * ridge * inner).ravel(), into.sum(axis=0)]
        return value, np.concatenate([*gradient, hidden.T @ slope + 2 * ridge * outer, [slope.sum()]])

    draw = np.random.default_rng(0)
    start = [draw.normal(0, 0.3, k * units), np.zeros(units), draw.normal(0, 0.3, units), [0.0]]
    inner, offset, outer, bias = parts(
        minimize(loss, np.concatenate(start), jac=True, method="L-BFGS-B", options={"maxiter": 400}).x.round(3)
    )
    return text_detector.Judge(
        rows=np.column_stack([centre.round(4), spread.round(4), inner]), offset=offset, outer=outer, bias=bias
    )


def as_code(judge: text_detector.Judge) -> str:
    """The lines of `curation/text_detector.py` that say so."""

    def numbers(values: np.ndarray) -> str:
        return ", ".join(f"{value:g}" for value in values)

    rows = "".join(f'    "{n}": ({numbers(row)}),\n' for n, row in zip(text_detector.FEATURES, judge.rows, strict=True))
    return (
        f"FEATURES: dict[str, tuple[float, ...]] = {{\n{rows}}}\n"
        f"OFFSET = ({numbers(judge.offset)})\nOUTER = ({numbers(judge.outer)})\nBIAS = {judge.bias:g}\n"
    )


def measure(photos: Sequence[tuple[str, Image.Image, str]], seed: int, fonts: Sequence[str]) -> dict[str, float]:
    """The figures of the top of this file."""
    shares = []
    both = painted_area = box_area = 0
    seconds = time.process_time()
    for key, photo, caption in photos:
        painted, truth = paint(Random(hash64(seed, key)), photo, caption, fonts)
        marked, clean = (area(text_detector.detect(picture), photo.size) for picture in (painted, photo))
        inked = area(truth, photo.size)
        shares.append((marked.mean(), clean.mean()))
        both, painted_area, box_area = (
            both + (marked & inked).sum(),
            painted_area + inked.sum(),
            box_area + marked.sum(),
        )
    share = np.array(shares)
    found, alarms = (share >= FLAGGED).mean(axis=0)
    any_found, any_alarms = (share > 0).mean(axis=0)
    return {
        "pictures": len(share), "found": float(found), "false_alarms": float(alarms), "any_found": float(any_found),
        "any_false_alarms": float(any_alarms), "recall": float(both / painted_area),
        "precision": float(both / box_area), "ms_a_picture": 500 * (time.process_time() - seconds) / len(share),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="shards to fit on")
    parser.add_argument("--unseen", type=Path, nargs="+", required=True, help="shards to measure on")
    parser.add_argument("--limit", type=int, default=1000, help="photographs of each, at most")
    arguments = parser.parse_args()
    if arguments.photos:
        judge = fit(*gather(list(photographs(arguments.photos))[: arguments.limit], seed=1))
        print(as_code(judge))
        text_detector.JUDGE = judge
    for path in arguments.unseen:
        figures = measure(list(photographs([path]))[: arguments.limit], seed=77, fonts=FONTS["unseen"])
        print(path.name, {name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
