"""The page's drawings as coordinates: the template makes SVG of them, so text is escaped and colours are the page's.

Each function turns counts into a path, ticks and lines on a canvas of `width` x
`height` units; `figure` in the template draws any of them. No drawing library:
the figures of a page are bars and dashed lines, and as inline SVG they follow
the reader's light or dark scheme, and cost kilobytes and no start-up time.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22  # margins of a canvas, for the labels of the axes
BARS = 160  # of a figure of clusters, at most


def short(value: float) -> str:
    """A number in at most five characters or so: 0.28, 340, 1.5k, 20M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 if size > 1e3 else 10):
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def histogram(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The figure of one of the summary's histograms: kept below, dropped on top, thresholds dashed."""
    count = len(entry["kept"])
    edges = [entry["low"] + (entry["high"] - entry["low"]) * i / count for i in range(count + 1)]
    drawn = _bars(340, 168, edges, entry["kept"], entry["dropped"])
    step = (edges[-1] - edges[0]) / count
    whole = float(edges[0] * 2).is_integer() and float(step).is_integer()  # bins around whole numbers
    ticks = [t for t in nice_ticks(edges[0], edges[-1], 5) if not whole or t == int(t)]
    return {
        **drawn,
        "xticks": [(drawn["x"](t), short(t)) for t in ticks],
        "xlines": [(drawn["x"](t), short(t)) for t in sorted(set(entry["thresholds"]))],
        "ylines": [],
    }


def clusters(before: Sequence[int], after: Sequence[int], cap: int | None) -> dict[str, Any]:
    """Sizes of clusters, the largest first; where there are many, a bar is the mean of neighbours."""
    order = sorted(range(len(before)), key=lambda i: (-before[i], i))
    groups = [order[i * len(order) // n : (i + 1) * len(order) // n] for n in [min(BARS, len(order))] for i in range(n)]
    kept = [sum(after[i] for i in g) / len(g) for g in groups]
    dropped = [sum(before[i] - after[i] for i in g) / len(g) for g in groups]
    drawn = _bars(1040, 220, [len(order) * i / len(groups) for i in range(len(groups) + 1)], kept, dropped)
    return {
        **drawn,
        "xticks": [(drawn["x"](t), short(t)) for t in nice_ticks(0, len(order), 8)],
        "xlines": [],
        "ylines": [(drawn["y"](cap), short(cap))] if cap is not None and cap <= drawn["top"] else [],
    }


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _bars(
    width: int, height: int, edges: Sequence[float], kept: Sequence[float], dropped: Sequence[float]
) -> dict[str, Any]:
    """Stacked bars between neighbouring edges."""
    top = max([k + d for k, d in zip(kept, dropped, strict=True)], default=0) or 1

    def x(value: float) -> float:
        return round(LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (width - LEFT - RIGHT), 2)

    def y(value: float) -> float:
        return round(height - BOTTOM - value / top * (height - TOP - BOTTOM), 2)

    spans = [(x(a), x(b)) for a, b in itertools.pairwise(edges)]
    gap = min(0.8, 0.2 * (spans[0][1] - spans[0][0]))
    sums = [k + d for k, d in zip(kept, dropped, strict=True)]
    return {
        "width": width,
        "height": height,
        "kept": _path((a, b - gap, y(0), y(k)) for (a, b), k in zip(spans, kept, strict=True) if k),
        "dropped": _path((a, b - gap, y(k), y(s)) for (a, b), k, s in zip(spans, kept, sums, strict=True) if s > k),
        "yticks": [(y(t), short(t)) for t in nice_ticks(0, top, 3)],
        "base": y(0),
        "left": LEFT,
        "right": width - RIGHT,
        "x": x,
        "y": y,
        "top": top,
    }


def _path(boxes: Iterable[tuple[float, float, float, float]]) -> str:
    """SVG of boxes (left, right, bottom, top); none is lower than half a unit, so that a lone sample shows."""
    return "".join(f"M{a:g} {bottom:g}V{min(t, bottom - 0.5):g}H{b:g}V{bottom:g}Z" for a, b, bottom, t in boxes)
