"""Captioning: greedy captions graded by CIDEr-D and BLEU-4 against all references.

The scorers are pycocoevalcap's own, in pure Python. Its tokeniser needs Java;
lower case with full stops and commas dropped comes within 0.0005 of its CIDEr-D
and BLEU-4 on Flickr8k. Document frequencies are those of all graded images
together: scored in chunks, or one image at a time, CIDEr-D is another number.

BLEU is no mean over images, so its interval resamples the n-gram counts of the
images and recomputes it; CIDEr-D is a mean of scores by image. There is no
chance level in captioning. What stands in for it, when `fixed_captions` names
a file, is the best score that one of its lines reaches as the caption of every
image (about a second a line for 1,000 images: keep the file short).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from curation.errors import UserError
from evaluation import encode, statistics
from evaluation.data import Pictures, RetrievalData
from evaluation.encode import Model
from evaluation.results import Graded, Measurement


@dataclass(frozen=True, kw_only=True)
class CaptioningSettings:
    """`limit`: the first images only, None for all; `fixed_captions`: a text file, one caption a line.

    Under a limit CIDEr-D is of other document frequencies: it is no estimate of the whole set's.
    """

    limit: int | None = None
    max_new_tokens: int = 32
    fixed_captions: Path | None = None
    bootstrap: int = statistics.BOOTSTRAP


def tokenise(caption: str) -> str:
    """Lower case, no full stops and commas at the ends of words, single spaces."""
    words = (word.rstrip(".,") for word in caption.lower().split())
    return " ".join(word for word in words if word)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D by image, float64 [n]; the corpus score is its mean. Texts as written, tokenised here."""
    from pycocoevalcap.cider.cider import Cider

    truth = {i: [tokenise(text) for text in texts] for i, texts in enumerate(references)}
    _, scores = Cider().compute_score(truth, {i: [tokenise(text)] for i, text in enumerate(captions)})
    return np.asarray(scores, dtype=np.float64)


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What BLEU-4 is made of, by image: float64 [n, 10] = length, closest reference length, 4 matches, 4 n-grams."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, texts in zip(captions, references, strict=True):
        scorer += (tokenise(caption), [tokenise(text) for text in texts])
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        rows.append([length, closest, *counts["correct"], *counts["guess"]])
    return np.array(rows, dtype=np.float64)


def bleu4(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of summed counts [s, 10]: float64 [s] (Papineni et al. 2002, with pycocoevalcap's tiny constants)."""
    precision = (sums[:, 2:6] + 1e-15) / (sums[:, 6:] + 1e-9)
    ratio = (sums[:, 0] + 1e-15) / (sums[:, 1] + 1e-9)
    return np.prod(precision, axis=1) ** 0.25 * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))


def write_captions(model: Model, pictures: Pictures, *, max_new_tokens: int, batch: int | None) -> list[str]:
    """Greedy captions of all pictures, in order."""
    written: list[str] = []
    for indices in encode.batches(len(pictures), batch or encode.BATCH):
        pixels = model.images([pictures[index] for index in indices])
        written += model.caption(pixels, max_new_tokens=max_new_tokens)
    return written[: len(pictures)]


def best_fixed_caption(path: Path, references: Sequence[Sequence[str]]) -> float:
    """The best CIDEr-D that one line of the file reaches as the caption of every image."""
    if not path.is_file():
        raise UserError(f"captioning.fixed_captions = {path}: no such file; name a text file with a caption a line")
    lines = [line for line in path.read_text().split("\n") if line.strip()]
    if not lines:
        raise UserError(f"captioning.fixed_captions = {path}: holds no caption")
    everyone = tqdm(lines, desc="fixed captions", leave=False, disable=None)
    return max(float(cider_d([line] * len(references), references).mean()) for line in everyone)


def grade(
    model: Model,
    data: RetrievalData,
    settings: CaptioningSettings,
    *,
    cache: Path | None = None,
    batch: int | None = None,
) -> Graded:
    """cider_d and bleu_4 of greedy captions; the captions are the result's records.

    `cache` holds embeddings and is not used here.

    Raises:
        UserError: the model has no language head, or `fixed_captions` cannot be read.
    """
    if not model.can_caption:
        raise UserError(f"--tasks captioning: checkpoint {model.name} writes no captions; leave the task out")
    pictures, references = data.pictures.head(settings.limit), data.captions[: settings.limit]
    fixed = best_fixed_caption(settings.fixed_captions, references) if settings.fixed_captions else None
    captions = write_captions(model, pictures, max_new_tokens=settings.max_new_tokens, batch=batch)
    return graded(captions, references, data.uids[: len(captions)], samples=settings.bootstrap, fixed=fixed)


def graded(
    captions: list[str],
    references: list[list[str]],
    uids: Sequence[str],
    *,
    samples: int,
    fixed: float | None = None,
    picture: np.ndarray | None = None,
) -> Graded:
    """cider_d and bleu_4 of captions [n] against their references, with the captions as records.

    Args:
        samples: of the bootstrap · fixed: what one caption for all reaches, as CIDEr-D's chance ·
            picture: int [n], of 0, 1, ...: captions of one number are one cluster of the intervals. None: all apart.
    """
    scores, counts = cider_d(captions, references), bleu_counts(captions, references)
    n, by_picture = len(captions), counts
    if picture is not None:
        by_picture = np.zeros((picture.max() + 1, counts.shape[1]))
        np.add.at(by_picture, picture, counts)
    measurements = [
        Measurement(
            metric="cider_d",
            value=float(scores.mean()),
            n=n,
            chance=fixed,
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
        {"uid": uid, "caption": caption, "references": texts, "cider_d": score}
        for uid, caption, texts, score in zip(uids, captions, references, scores.tolist(), strict=True)
    ]
    clusters = {} if picture is None else {"cluster/cider_d": picture}
    return Graded(measurements=measurements, per_query={"cider_d": scores, **clusters}, records=records)
