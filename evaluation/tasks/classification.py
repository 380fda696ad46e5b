"""Zero-shot classification: the class whose averaged prompt embedding is nearest.

Each class is the normalised mean of its prompts' embeddings over all templates
(CLIP's recipe; Radford et al. 2021). Ties are shared fairly, as in retrieval.
Accuracy has Wilson's interval, mean per-class recall a bootstrap within
classes; chance is k in C.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import encode, statistics
from evaluation.data import ClassificationData
from evaluation.encode import Model
from evaluation.results import Graded, Measurement
from evaluation.tasks.retrieval import best_ranks, expected_hit


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """`limit`: the first images only."""

    limit: int | None = None
    bootstrap: int = statistics.BOOTSTRAP


def class_embeddings(model: Model, data: ClassificationData, *, cache: Path | None, batch: int | None) -> np.ndarray:
    """One unit vector a class: float64 [C, D]."""
    prompts = [template.replace("{c}", name) for name in data.class_names for template in data.templates]
    embedded = encode.encode_texts(model, prompts, cache=cache, batch=batch).astype(np.float64)
    means = embedded.reshape(len(data.class_names), len(data.templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def grade(
    model: Model,
    data: ClassificationData,
    settings: ClassificationSettings,
    *,
    cache: Path | None = None,
    batch: int | None = None,
) -> Graded:
    """acc1, acc5 (where there are more than five classes) and mean_per_class_recall.

    Raises:
        UserError: embeddings that are NaN or collapsed.
    """
    classes = class_embeddings(model, data, cache=cache, batch=batch)
    images = encode.encode_images(model, data.pictures.head(settings.limit), cache=cache, batch=batch)
    labels = np.array(data.labels[: settings.limit])
    total, n = len(classes), len(labels)
    ranks = best_ranks(images, classes, np.arange(n + 1), labels)
    per_query = {f"acc{k}": expected_hit(ranks, k) for k in (1, 5) if k == 1 or k < total}
    measurements = [
        Measurement(
            metric=metric,
            value=float(hits.mean()),
            n=n,
            chance=int(metric[3:]) / total,
            ci95=statistics.proportion_interval(hits),
        )
        for metric, hits in per_query.items()
    ]
    hits = np.bincount(labels, weights=per_query["acc1"], minlength=total)
    totals = np.bincount(labels, minlength=total)
    present = totals > 0
    measurements.append(
        Measurement(
            metric="mean_per_class_recall",
            value=float((hits[present] / totals[present]).mean()),
            n=n,
            chance=1 / total,
            ci95=statistics.stratified_mean_recall_interval(hits, totals, samples=settings.bootstrap),
        )
    )
    return Graded(measurements=measurements, per_query=per_query)
