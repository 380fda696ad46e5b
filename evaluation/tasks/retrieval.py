"""Image-text retrieval with ranks that are fair to ties.

A query scores by its best-ranked positive: an image by any of its captions
(hit@k), a caption by its image. Where candidates tie with that positive, the
exact expectation over all orders of the tied candidates is taken, so that
constant embeddings score chance and not 0 % or 100 % as with `topk`.

Cosines are taken in float64 and rounded to 1e-6 before they are compared:
float32 noise of the encoder (about 1e-7, different in every position of a
batch) must not decide between two copies of one picture.

The similarity matrix is only ever held a block of rows at a time.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from curation.errors import UserError
from evaluation import encode, statistics
from evaluation.data import RetrievalData
from evaluation.encode import Model
from evaluation.results import Graded, Measurement

RESOLUTION = 1e6
CELLS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """`captions`: all of an image's captions as texts, or the first alone; `limit`: the first images only."""

    k: tuple[int, ...] = (1, 5, 10)
    captions: Literal["all", "first"] = "all"
    limit: int | None = None
    bootstrap: int = statistics.BOOTSTRAP


class Ranks(NamedTuple):
    """Where the best positive of each query [n] stands: `above` candidates beat it, `tied` share its score.

    `tied` counts the positives in the tie too, `positives` only them.
    """

    above: np.ndarray
    tied: np.ndarray
    positives: np.ndarray


def best_ranks(queries: np.ndarray, candidates: np.ndarray, starts: np.ndarray, positives: np.ndarray) -> Ranks:
    """Rank the candidates [C, D] for every query [Q, D].

    The positives of query i are `positives[starts[i]:starts[i + 1]]`, at least one.
    """
    total = len(queries)
    found = Ranks(*(np.zeros(total, dtype=np.int64) for _ in range(3)))
    transposed = candidates.astype(np.float64).T
    piece = max(1, CELLS // len(candidates))
    for first in range(0, total, piece):
        rows = slice(first, min(first + piece, total))
        scores = np.rint((queries[rows].astype(np.float64) @ transposed) * RESOLUTION)
        best = np.empty(len(scores))
        for row, query in enumerate(range(rows.start, rows.stop)):
            own = scores[row, positives[starts[query] : starts[query + 1]]]
            best[row] = own.max()
            found.positives[query] = (own == best[row]).sum()
        found.above[rows] = (scores > best[:, None]).sum(axis=1)
        found.tied[rows] = (scores == best[:, None]).sum(axis=1)
    return found


@lru_cache(maxsize=256)
def first_position(total: int, positives: int) -> np.ndarray:
    """Distribution of the first positive's position among `total` candidates in random order.

    Negative hypergeometric: float64 [total - positives + 1], entry j is the
    probability of position j + 1.
    """
    j = np.arange(total - positives + 2, dtype=np.float64)
    beyond = np.ones_like(j)  # P(position > j) = C(total - j, positives) / C(total, positives)
    for taken in range(positives):
        beyond *= np.clip(total - taken - j, 0, None) / (total - taken)
    return beyond[:-1] - beyond[1:]


def expected_hit(ranks: Ranks, k: int) -> np.ndarray:
    """Probability [n] that the best positive is among the top k, over random orders of the ties."""
    hits = np.zeros(len(ranks.above))
    for index, (above, tied, positives) in enumerate(zip(*ranks, strict=True)):
        if above < k:
            hits[index] = 1.0 if tied == positives else min(1.0, first_position(tied, positives)[: k - above].sum())
    return hits


def expected_reciprocal(ranks: Ranks) -> np.ndarray:
    """Expected reciprocal rank [n] of the best positive, over random orders of the ties."""
    values = 1.0 / (ranks.above + 1.0)
    for index in np.flatnonzero(ranks.tied > ranks.positives):
        chances = first_position(int(ranks.tied[index]), int(ranks.positives[index]))
        values[index] = (chances / (ranks.above[index] + 1.0 + np.arange(len(chances)))).sum()
    return values


def expected_rank(ranks: Ranks) -> np.ndarray:
    """Expected rank [n] of the best positive, 1 is the top."""
    return ranks.above + (ranks.tied + 1) / (ranks.positives + 1)


def chance_median(total: int, counts: np.ndarray) -> float:
    """The median rank of the best positive when the order is random; `counts` [n] positives a query."""
    reached = np.zeros(total)
    for count, share in zip(*np.unique(counts, return_counts=True), strict=True):
        distribution = first_position(total, int(count))
        reached[: len(distribution)] += share / len(counts) * distribution
    reached = np.cumsum(reached) - 0.5
    return float(np.argmax(reached > -1e-9) + np.argmax(reached > 1e-9)) / 2 + 1


def direction(
    name: str, ranks: Ranks, total: int, counts: np.ndarray, clusters: np.ndarray | None, settings: RetrievalSettings
) -> Graded:
    """All figures of one direction; `total` candidates, `counts` [n] positives a query."""
    nothing = Ranks(np.zeros_like(counts), np.full_like(counts, total), counts)  # everything tied = a random order
    scores = {f"{name}_recall@{k}": (expected_hit(ranks, k), expected_hit(nothing, k).mean()) for k in settings.k}
    scores[f"{name}_mrr"] = (expected_reciprocal(ranks), expected_reciprocal(nothing).mean())
    options = {"clusters": clusters, "samples": settings.bootstrap}
    measurements = [
        Measurement(
            metric=metric,
            value=float(values.mean()),
            n=len(values),
            chance=float(chance),
            ci95=statistics.proportion_interval(values, clusters=clusters)
            if "recall" in metric
            else statistics.mean_interval(values, **options),  # type: ignore[arg-type]
        )
        for metric, (values, chance) in scores.items()
    ]
    expected = expected_rank(ranks)
    measurements.append(
        Measurement(
            metric=f"{name}_median_rank",
            value=float(np.median(expected)),
            n=len(expected),
            chance=chance_median(total, counts),
            ci95=statistics.median_interval(expected, **options),  # type: ignore[arg-type]
        )
    )
    per_query = {metric: values for metric, (values, _) in scores.items()}
    if clusters is not None:
        per_query |= {f"cluster/{metric}": clusters for metric in scores}
    return Graded(measurements=measurements, per_query=per_query)


def grade_embeddings(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, settings: RetrievalSettings) -> Graded:
    """Both directions from embeddings: images [N, D], texts [T, D], `owner` [T] the image of each text, ascending."""
    counts = np.bincount(owner, minlength=len(images))
    starts = np.concatenate([[0], np.cumsum(counts)])
    everyone = np.arange(len(texts) + 1)
    clusters = owner if len(texts) > len(images) else None
    to_text = best_ranks(images, texts, starts, everyone)
    to_image = best_ranks(texts, images, everyone, owner)
    one = np.ones(len(texts), dtype=np.int64)
    parts = [
        direction("image_to_text", to_text, len(texts), counts, None, settings),
        direction("text_to_image", to_image, len(images), one, clusters, settings),
    ]
    return Graded(
        measurements=[m for part in parts for m in part.measurements],
        per_query={name: array for part in parts for name, array in part.per_query.items()},
    )


def texts_of(data: RetrievalData, settings: RetrievalSettings) -> tuple[list[str], np.ndarray]:
    """The texts of the graded images, flat [T], and the image that owns each of them [T]."""
    chosen = data.captions[: settings.limit]
    if settings.captions == "first":
        chosen = [captions[:1] for captions in chosen]
    owner = np.repeat(np.arange(len(chosen)), [len(captions) for captions in chosen])
    return [caption for captions in chosen for caption in captions], owner


def grade(
    model: Model,
    data: RetrievalData,
    settings: RetrievalSettings,
    *,
    cache: Path | None = None,
    batch: int | None = None,
) -> Graded:
    """R@k, mean reciprocal rank and median rank, image to text and text to image.

    Raises:
        UserError: a wrong setting, or embeddings that are NaN or collapsed.
    """
    if not settings.k or min(settings.k) < 1:
        raise UserError(f"retrieval.k = {settings.k}: needs ranks of 1 and more")
    if settings.captions not in ("all", "first"):
        raise UserError(f"retrieval.captions = {settings.captions!r}: must be 'all' or 'first'")
    texts, owner = texts_of(data, settings)
    images = encode.encode_images(model, data.pictures.head(settings.limit), cache=cache, batch=batch)
    return grade_embeddings(images, encode.encode_texts(model, texts, cache=cache, batch=batch), owner, settings)
