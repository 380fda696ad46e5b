"""Retrieval between regions of pictures and their phrases, over all regions of the set.

Phrases repeat ("person" in half the pictures), so a candidate is a phrase and
not its copies: a region looks for the one phrase that is its own among all
different ones, and a phrase for any of the regions that it names. Chance follows
from the same counts. Ties are shared fairly, as in `evaluation.tasks.retrieval`,
whose figures these are; regions of one picture are one cluster of its intervals.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from curation.errors import UserError
from evaluation import encode, statistics
from evaluation.data import RegionData
from evaluation.regions import RegionModel, Seen, encode_regions
from evaluation.results import Graded
from evaluation.tasks.retrieval import RetrievalSettings, best_ranks, direction


@dataclass(frozen=True, kw_only=True)
class RegionRetrievalSettings:
    """`limit`: the first regions only."""

    k: tuple[int, ...] = (1, 5, 10)
    limit: int | None = None
    bootstrap: int = statistics.BOOTSTRAP


def grade(
    model: RegionModel,
    data: RegionData,
    settings: RegionRetrievalSettings,
    *,
    cache: Path | None = None,
    batch: int | None = None,
) -> Graded:
    """R@k, mean reciprocal rank and median rank, region to phrase and phrase to region.

    Raises:
        UserError: a wrong setting, a model without regions, or embeddings that are NaN or collapsed.
    """
    if not settings.k or min(settings.k) < 1:
        raise UserError(f"region_retrieval.k = {settings.k}: needs ranks of 1 and more")
    seen = Seen(model, data, "region_retrieval", settings.limit)
    regions = encode_regions(seen, cache=cache, batch=batch)
    phrases = sorted(set(seen.phrases))
    texts = encode.encode_texts(model, phrases, cache=cache, batch=batch)
    found = grade_embeddings(regions, texts, [phrases.index(p) for p in seen.phrases], seen.owner, settings)
    return replace(found, queries=seen.identity)


def grade_embeddings(
    regions: np.ndarray,
    texts: np.ndarray,
    phrase: "np.ndarray | list[int]",
    owner: np.ndarray,
    settings: RegionRetrievalSettings,
) -> Graded:
    """Both directions from embeddings: regions [R, D], texts [T, D], the phrase [R] and the picture [R] of each."""
    phrase = np.asarray(phrase)
    how = RetrievalSettings(k=settings.k, bootstrap=settings.bootstrap)
    to_phrase = best_ranks(regions, texts, np.arange(len(regions) + 1), phrase)
    counts = np.bincount(phrase, minlength=len(texts))
    starts = np.concatenate([[0], np.cumsum(counts)])
    to_region = best_ranks(texts, regions, starts, np.argsort(phrase, kind="stable"))
    one = np.ones(len(regions), np.int64)
    parts = [
        direction("region_to_phrase", to_phrase, len(texts), one, owner, how),
        direction("phrase_to_region", to_region, len(regions), counts, None, how),
    ]
    return Graded(
        measurements=[m for part in parts for m in part.measurements],
        per_query={name: array for part in parts for name, array in part.per_query.items()},
    )
