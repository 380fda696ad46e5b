"""Captions of regions, graded against the phrase of each by CIDEr-D and BLEU-4, as whole pictures are.

Regions of one picture are one cluster of CIDEr-D's interval, and of BLEU's: its
n-gram counts are summed over a picture before pictures are resampled.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.errors import UserError
from evaluation import encode, statistics
from evaluation.data import RegionData
from evaluation.regions import RegionModel, Seen
from evaluation.results import Graded, Measurement
from evaluation.tasks.captioning import bleu4, bleu_counts, cider_d


@dataclass(frozen=True, kw_only=True)
class RegionCaptioningSettings:
    """`limit`: the first regions only."""

    limit: int | None = 1_000
    max_new_tokens: int = 32
    bootstrap: int = statistics.BOOTSTRAP


def grade(
    model: RegionModel,
    data: RegionData,
    settings: RegionCaptioningSettings,
    *,
    cache: Path | None = None,
    batch: int = encode.BATCH,
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
    for indices in encode.batches(len(seen.phrases), batch):
        captions += model.caption_regions(*seen.batch(indices), max_new_tokens=settings.max_new_tokens)
    captions = captions[: len(seen.phrases)]
    references = [[phrase] for phrase in seen.phrases]
    scores, counts = cider_d(captions, references), bleu_counts(captions, references)
    _, picture = np.unique(seen.owner, return_inverse=True)
    by_picture = np.zeros((picture.max() + 1, counts.shape[1]))
    np.add.at(by_picture, picture, counts)
    n, samples = len(captions), settings.bootstrap
    measurements = [
        Measurement(
            metric="cider_d",
            value=float(scores.mean()),
            n=n,
            chance=None,
            ci95=statistics.mean_interval(scores, clusters=picture, samples=samples),
        ),
        Measurement(
            metric="bleu_4",
            value=float(bleu4(counts.sum(axis=0)[None])[0]),
            n=n,
            chance=None,
            ci95=statistics.statistic_interval(by_picture, bleu4, samples=samples),
        ),
    ]
    records: list[dict[str, Any]] = [
        {"uid": data.uids[owner], "caption": caption, "references": texts, "cider_d": score}
        for owner, caption, texts, score in zip(seen.owner.tolist(), captions, references, scores.tolist(), strict=True)
    ]
    return Graded(measurements=measurements, per_query={"cider_d": scores, "cluster/cider_d": picture}, records=records)
