"""Frozen image tokenizers: which of K codes each patch of a picture is, the target of masked image modelling.

FLAVA predicts the codes of DALL-E's tokenizer, which transformers holds as
`FlavaImageCodebook`. Where its weights are not at hand, `PatchCodebook` is
trained on the pictures of the data in seconds: principal components of raw
patches, and k-means in them. Its codes say colour and coarse edge of a patch,
which is less than DALL-E's, and enough to learn from what surrounds a hole.

Both look at a picture of 8 pixels a patch (112 pixels for 14 x 14 in the paper,
section 4.1), and at each in the same way whatever chunk it comes in: one picture
at a time in float64 here, batches of one size there.
"""

import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curation.errors import UserError
from curation.hashing import hash64
from training.config import LoaderConfig
from training.data import Order, Source, decode
from training.data import picture as image_member
from training.family_config import CodebookConfig
from training.models.kind import check_whole, opened_model

PATCH = 8
"""Side in pixels of what a code stands for; DALL-E's encoder pools three times by two."""
PICTURES, PATCHES = 1000, 100
"""The most pictures that a codebook is trained on, and patches of each: 256 patches a code and more."""
BATCH = 16
"""Pictures that a convolutional tokenizer sees at once."""


def _fitted(picture: np.ndarray, grid: int) -> np.ndarray:
    """uint8 [S, S, 3] -> uint8 [8 grid, 8 grid, 3]."""
    side = grid * PATCH
    if picture.shape[0] == side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def _patches(picture: np.ndarray) -> np.ndarray:
    """uint8 [8 g, 8 g, 3] -> float64 [g * g, 192] in 0..1, row by row."""
    g = picture.shape[0] // PATCH
    cut = picture.reshape(g, PATCH, g, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(g * g, -1) / 255.0


@dataclass(frozen=True)
class PatchCodebook:
    """mean [192] · basis [192, d] orthonormal columns · centroids [K, d]; a patch's code is its nearest centroid."""

    mean: np.ndarray
    basis: np.ndarray
    centroids: np.ndarray

    @property
    def vocab_size(self) -> int:
        return len(self.centroids)

    def __call__(self, pictures: np.ndarray, grid: int) -> torch.Tensor:
        """Codes of pictures uint8 [c, S, S, 3] on a grid: int64 [c, grid * grid]."""
        codes = [self._nearest((_patches(_fitted(p, grid)) - self.mean) @ self.basis) for p in pictures]
        return torch.from_numpy(np.stack(codes))

    def _nearest(self, points: np.ndarray) -> np.ndarray:
        """[n, d] -> int64 [n]; the first of equally near ones."""
        return (0.5 * (self.centroids**2).sum(1) - points @ self.centroids.T).argmin(1)

    def pixels(self, codes: torch.Tensor) -> np.ndarray:
        """What codes [n] stand for: float64 [n, 8, 8, 3] in 0..1."""
        return (self.centroids[codes.numpy()] @ self.basis.T + self.mean).reshape(-1, PATCH, PATCH, 3)

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "basis": self.basis, "centroids": self.centroids}
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "codebook.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "patch_codebook", "patch": PATCH}))  # last

    @classmethod
    def from_pretrained(cls, folder: Path) -> "PatchCodebook":
        from safetensors.numpy import load_file

        return cls(**load_file(folder / "codebook.safetensors"))


@dataclass(frozen=True)
class ConvolutionalCodebook:
    """transformers' `FlavaImageCodebook`: DALL-E's encoder, frozen, on the device that it was put on."""

    model: Any

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, grid: int) -> torch.Tensor:
        """Codes of pictures uint8 [c, S, S, 3] on a grid: int64 [c, grid * grid]."""
        side, found = grid * PATCH, []
        scaled = torch.from_numpy(np.stack([_fitted(p, grid) for p in pictures])).permute(0, 3, 1, 2) / 255
        mapped = 0.8 * scaled + 0.1  # DALL-E's logit-Laplace range (arXiv 2102.12092, appendix A.3)
        for part in mapped.split(BATCH):
            batch = mapped.new_zeros(BATCH, 3, side, side)
            batch[: len(part)] = part
            codes = self.model.get_codebook_indices(batch.to(self.model.device, self.model.dtype))
            found.append(codes[: len(part)].flatten(1).cpu())
        return torch.cat(found)


Codebook = PatchCodebook | ConvolutionalCodebook


def train_codebook(pictures: Iterable[np.ndarray], vocab_size: int, seed: int = 0, width: int = 32) -> PatchCodebook:
    """k-means over `width` principal components of patches of pictures uint8 [8 g, 8 g, 3], at most `PICTURES`.

    Patches are drawn by hash(seed, number of the picture).

    Raises:
        UserError: fewer patches than codes.
    """
    import faiss

    drawn = []
    for number, picture in zip(range(PICTURES), pictures):
        patches = _patches(picture)
        rng = np.random.default_rng(hash64(seed, "codebook", number))
        drawn.append(patches[rng.permutation(len(patches))[:PATCHES]])
    points = np.concatenate(drawn) if drawn else np.zeros((0, 3 * PATCH**2))
    if len(points) < vocab_size:
        raise UserError(
            f"flava.codebook.vocab_size: {vocab_size} codes are more than the {len(points)} patches of the pictures; "
            "lower it or name a trained codebook in flava.codebook.name_or_path"
        )
    mean = points.mean(0)
    _, vectors = np.linalg.eigh(np.cov((points - mean).T))  # ascending
    basis = vectors[:, : -width - 1 : -1]
    low = np.ascontiguousarray((points - mean) @ basis, np.float32)
    kmeans = faiss.Kmeans(
        width,
        vocab_size,
        niter=20,
        seed=hash64(seed, "kmeans") >> 33,
        min_points_per_centroid=1,
        max_points_per_centroid=len(low),
    )
    kmeans.train(low)
    return PatchCodebook(mean, np.ascontiguousarray(basis), np.asarray(kmeans.centroids, np.float64))


def drawn_pictures(sources: Sequence[Source], grid: int, config: LoaderConfig) -> Iterator[np.ndarray]:
    """Readable pictures of the sources in turn, uint8 [8 grid, 8 grid, 3], each source in a shuffled order that opens
    few shards at a time."""
    pictured = [source.samples for source in sources if source.kind in ("pairs", "images")]
    orders = [Order(s.sizes, hash64("codebook", number), config.window_shards) for number, s in enumerate(pictured)]
    for position in itertools.count():
        left = [(samples, order) for samples, order in zip(pictured, orders) if position < order.total]
        if not left:
            return
        for samples, order in left:
            _, part, index = order(position)
            try:
                fields = samples.sample(int(samples.sizes[:part].sum()) + index)
                yield decode(image_member(fields), grid * PATCH, config.resize_mode or "squash")
            except UserError:
                raise
            except Exception:  # whatever a reader or Pillow raises; broken samples are counted when they are drawn
                continue


def load_codebook(config: CodebookConfig, folder: Path, pictures: Iterable[np.ndarray]) -> Codebook:
    """The recipe's codebook; one trained on `pictures` is kept in `folder` and used again.

    Raises:
        UserError: a name or folder that holds no image tokenizer, or one with another number of codes.
    """
    if config.name_or_path is not None:
        found = _named(config.name_or_path)
    elif (folder / "config.json").exists():
        found = PatchCodebook.from_pretrained(folder)
    else:
        found = train_codebook(pictures, config.vocab_size)
        found.save_pretrained(folder)
    if found.vocab_size != config.vocab_size:
        raise UserError(
            f"flava.codebook.vocab_size: {config.vocab_size}, but {config.name_or_path or folder} has "
            f"{found.vocab_size} codes; write that number"
        )
    return found


@functools.cache
def _named(name_or_path: str) -> Codebook:
    from transformers import FlavaImageCodebook, PretrainedConfig

    try:
        kind = PretrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    except OSError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"flava.codebook.name_or_path: {name_or_path} cannot be read ({why})") from None
    if kind == "patch_codebook":
        check_whole(Path(name_or_path), "flava.codebook.name_or_path")
        return PatchCodebook.from_pretrained(Path(name_or_path))
    if kind != "flava_image_codebook":
        raise UserError(
            f"flava.codebook.name_or_path: {name_or_path} is a {kind!r}, not an image tokenizer; name a "
            "flava_image_codebook, or a folder of a trained patch codebook"
        )
    model = opened_model(FlavaImageCodebook, name_or_path, "flava.codebook.name_or_path").eval().requires_grad_(False)
    # A rank's own GPU by its number: this comes before DeepSpeed makes it the current one.
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return ConvolutionalCodebook(model.to(device))
