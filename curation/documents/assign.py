"""Pictures to sentences, as MMC4 does it.

Zhu et al. 2023 (arXiv 2304.06939), section 3, "Aligning images and sentences": the
cosines of all pictures and sentences of a document under CLIP ViT-L/14; pictures
without a sentence of at least 0.15 go; then the assignment of pictures to sentences
with the greatest sum, where a sentence has at most one picture. Footnote 11: where
there are more pictures than sentences, those left over go to their most similar one.

scipy's Hungarian solver gives the same sums as the Jonker-Volgenant one of their
code; with equal sums it may choose another of the best assignments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from curation.columns import raise_unless_of_a_sample
from curation.errors import one_line
from curation.signals.clip import Clip

BATCH = 64


def assign(similarity: np.ndarray) -> np.ndarray:
    """The sentence of each picture, int64 [pictures], from cosines [pictures, sentences]; at least one sentence."""
    from scipy.optimize import linear_sum_assignment

    pictures, sentences = linear_sum_assignment(similarity, maximize=True)
    sentence = similarity.argmax(axis=1)
    sentence[pictures] = sentences
    return sentence


@dataclass(frozen=True, kw_only=True)
class Matched:
    """For each picture of a document its sentence (-1: dropped) and the cosine with it."""

    sentence: np.ndarray  # int64 [pictures]
    similarity: np.ndarray  # float32 [pictures]


def match(similarity: np.ndarray, min_similarity: float) -> Matched:
    """Drop the pictures that are similar to no sentence, and assign the others.

    Args:
        similarity: float32 [pictures, sentences]
    """
    sentence = np.full(len(similarity), -1)
    reached = np.zeros(len(similarity), np.float32)
    if similarity.size:
        near = np.flatnonzero(similarity.max(axis=1) >= min_similarity)
        if len(near):
            sentence[near] = assign(similarity[near])
            reached[near] = similarity[near, sentence[near]]
    return Matched(sentence=sentence, similarity=reached)


class EncodingFailed(Exception):
    """The model failed on a batch of one document; what happened, in one line."""


class SentenceMeter:
    """Cosines of a document's pictures and sentences, fp32, in batches that begin with the document, so that the
    values are the same on any worker. Pictures are held only until their batch is full.

    What is not the document's fault (`curation.columns`) is raised as it is.
    """

    def __init__(self, clip: Clip) -> None:
        self._meter = clip.load("clip_score")
        self._waiting: list[Any] = []
        self._done: list[np.ndarray] = []

    def begin(self) -> None:
        """A document begins; of one before it nothing is left, whatever became of it."""
        self._waiting, self._done = [], []

    def pixels(self, image: Image.Image) -> Any:
        """The picture as the model wants it; what fails here is the picture's fault."""
        return self._meter.pixels(image)

    def see(self, pixels: Any) -> None:
        """Take the next picture of the document.

        Raises:
            EncodingFailed: the model fails on the batch that it fills.
        """
        self._waiting.append(pixels)
        if len(self._waiting) == BATCH:
            self._flush()

    def similarities(self, sentences: Sequence[str]) -> np.ndarray:
        """float32 [pictures of the document, sentences].

        Raises:
            EncodingFailed: the model fails on a batch.
        """
        self._flush()
        if not self._done or not sentences:
            return np.zeros((sum(map(len, self._done)), len(sentences)), np.float32)
        parts = [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]
        texts_sd = np.concatenate([self._encoded(self._meter.texts, part) for part in parts])
        return np.concatenate(self._done) @ texts_sd.T

    def _flush(self) -> None:
        if self._waiting:
            self._done.append(self._encoded(self._meter.images, self._waiting))
            self._waiting = []

    def _encoded(self, encoder: Callable[[Any], Any], batch: Sequence[Any]) -> np.ndarray:
        try:
            values: np.ndarray = encoder(batch).numpy()
        except Exception as reason:
            raise_unless_of_a_sample("assign.clip", reason)
            raise EncodingFailed(f"{type(reason).__name__}: {one_line(reason)}") from reason
        return values
