"""Captions of regions, graded against the phrase of each by CIDEr-D and BLEU-4, as whole pictures are.

Regions of one picture are one cluster of CIDEr-D's interval, and of BLEU's: its
n-gram counts are summed over a picture before pictures are resampled.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from curation.errors import UserError
from evaluation import encode, statistics
from evaluation.data import RegionData
from evaluation.regions import RegionModel, Seen
from evaluation.results import Graded
from evaluation.tasks.captioning import graded


@dataclass(frozen=True, kw_only=True)
class RegionCaptioningSettings:
    """`limit`: the first regions only, None for all (CIDEr-D changes with it, as in captioning)."""

    limit: int | None = None
    max_new_tokens: int = 32
    bootstrap: int = statistics.BOOTSTRAP


def grade(
    model: RegionModel,
    data: RegionData,
    settings: RegionCaptioningSettings,
    *,
    cache: Path | None = None,
    batch: int | None = None,
) -> Graded:
    """cider_d and bleu_4 of greedy captions; the captions are the result's records.

    `cache` holds embeddings and is not used here.

    Raises:
        UserError: a model without regions or without a language head.
    """
    if not model.can_caption:
        raise UserError(f"--tasks region_captioning: checkpoint {model.name} writes no captions; leave the task out")
    seen = Seen(model, data, "region_captioning", settings.limit)
    captions: list[str] = []
    for indices in encode.batches(len(seen.phrases), batch or encode.BATCH):
        captions += model.caption_regions(*seen.batch(indices), max_new_tokens=settings.max_new_tokens)
    captions = captions[: len(seen.phrases)]
    references = [[phrase] for phrase in seen.phrases]
    uids = [data.uids[owner] for owner in seen.owner.tolist()]
    _, picture = np.unique(seen.owner, return_inverse=True)
    found = graded(captions, references, uids, samples=settings.bootstrap, picture=picture)
    return replace(found, queries=seen.identity)
