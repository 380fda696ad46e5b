"""Regions encoded for the two region tasks.

A feature map is made once a picture, in batches of one size, and its regions
are pooled in batches of another: numbers do not depend on how many regions a
picture has, and a picture with thirty of them is looked at once, or twice where
they fall into two batches. A region that the model sees nothing of (outside the
centre square, where pictures are cropped to it) is left out before.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from curation.errors import UserError
from curation.hashing import config_hash
from evaluation import encode
from evaluation.data import RegionData
from evaluation.encode import Model
from training.regions import Region, Unseen

if TYPE_CHECKING:
    from torch import Tensor

MAPS = 16
"""Pictures whose feature maps are made at a time."""


class RegionModel(Model, Protocol):
    """What the region tasks ask of a model beside the rest; `can_regions` says whether it can."""

    @property
    def can_regions(self) -> bool: ...

    def region_weights(self, region: Region, size: tuple[int, int], /) -> np.ndarray:
        """float32 [N]; `Unseen` where the model sees nothing of the region."""

    def feature_maps(self, pixels: "Tensor", /) -> "Tensor":
        """Pixels [B, 3, S, S] -> [B, N, Dv]."""

    def embed_regions(self, maps: "Tensor", weights: "Tensor", /) -> "Tensor":
        """[B, N, Dv], [B, N] -> [B, D] float32, unit norm."""

    def caption_regions(self, maps: "Tensor", weights: "Tensor", max_new_tokens: int = 32) -> list[str]:
        """Greedy captions."""


class Seen:
    """The first `limit` regions that the model sees something of.

    weights float32 [R, N] over the patches · owner [R]: picture of each · phrases [R] · identity: a hash of which.

    Raises:
        UserError: a model without a feature map, or no such region.
    """

    def __init__(self, model: RegionModel, data: RegionData, task: str, limit: int | None) -> None:
        if not getattr(model, "can_regions", False):
            raise UserError(f"--tasks {task}: checkpoint {model.name} takes no regions; leave the task out")
        self.model, self.data = model, data
        weights: list[np.ndarray] = []
        kept: list[int] = []
        for number, (region, owner) in enumerate(zip(data.regions, data.owner.tolist(), strict=True)):
            if limit is not None and len(kept) == limit:
                break
            try:
                weights.append(model.region_weights(region, data.sizes[owner]))
                kept.append(number)
            except Unseen:
                continue
        if not kept:
            raise UserError(f"--tasks {task}: the model sees none of the regions of {data.name}")
        self.weights, self.owner = np.stack(weights), data.owner[kept]
        self.phrases = [data.regions[number].phrase for number in kept]
        self.identity = config_hash(kept)

    def batch(self, indices: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """(maps [B, N, Dv], weights [B, N]) of these regions."""
        import torch

        owner = self.owner[list(indices)]
        pictures, row = np.unique(owner, return_inverse=True)
        maps = []
        for start in range(0, len(pictures), MAPS):
            full = [pictures[min(i, len(pictures) - 1)] for i in range(start, start + MAPS)]
            maps.append(self.model.feature_maps(self.model.images([self.data.pictures[int(i)] for i in full])))
        return torch.cat(maps)[row], torch.from_numpy(self.weights[list(indices)])


def encode_regions(seen: Seen, *, cache: Path | None, batch: int | None) -> np.ndarray:
    """Embeddings of the regions, in order: float32 [R, D], unit norm.

    Raises:
        UserError: NaN, infinite or collapsed embeddings.
    """

    def compute(indices: list[int]) -> "Tensor":
        return seen.model.embed_regions(*seen.batch(indices))

    what = [seen.data.pictures.content_hash, seen.owner.tolist(), seen.weights.tobytes().hex()]
    return encode.encoded(
        seen.model, "regions", config_hash(what), len(seen.phrases), compute, cache, batch or encode.BATCH
    )
