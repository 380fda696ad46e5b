"""Embeddings, computed once per content and never believed blindly.

The cache is keyed by what an embedding depends on: the weights' hash, the
preprocessing, the modality, the bytes of the images or the prompts themselves,
the batch, the precision and the versions of the libraries that compute. Paths
and checkpoint names are not in it: peers that key on them grade the wrong
weights as soon as two runs both write `epoch_latest.pt`.

Batches have one fixed size, the last one filled up by repetition, so that the
kernels and therefore the numbers are the same for 10 items and for 10,000. A
model that sees pictures whole gets few of them at a time. Texts are encoded
once each, sorted by length (less padding), and equal texts get equal rows.

A picture that a model's processor refuses stays a query: its embedding is zero,
as near to one text as to another, so that all models are graded on the same
pictures and none gains by what it does not look at.

NaN and collapsed embeddings are refused before they reach the cache. Collapsed
means that most rows are the same row to within 1e-6: an untrained model passes
(it deserves its chance-level grade), a dead one does not. A broken tie rule
would otherwise give it 0 % or 100 %.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from curation.errors import UserError
from curation.hashing import config_hash
from curation.manifest import read_manifest, write_manifest
from evaluation.data import Pictures

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64
FEW = 4  # pictures at a time of a model that sees them whole ("fit"): of 12 megapixels each takes thousands of tokens
COLLAPSE = 1e-6
LIBRARIES = ("torch", "torchvision", "transformers", "open_clip_torch", "numpy", "pillow")


class Model(Protocol):
    """What grading asks of a model; `training.inference.load` returns one."""

    @property
    def name(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def weights_hash(self) -> str: ...

    @property
    def preprocess(self) -> dict[str, Any]:
        """All that shapes the input and the arithmetic: sizes, normalisation, prompts' tokens, compute precision."""

    @property
    def can_caption(self) -> bool: ...

    def images(self, images: list[Image.Image], /) -> "Tensor":
        """RGB images to pixels [B, 3, S, S]."""

    def embed_images(self, pixels: "Tensor", /) -> "Tensor":
        """[B, D] float32, unit norm."""

    def embed_texts(self, texts: list[str], /) -> "Tensor":
        """[B, D] float32, unit norm."""

    def caption(self, pixels: "Tensor", max_new_tokens: int = 32) -> list[str]:
        """Greedy captions."""


def software() -> dict[str, str]:
    """Versions of the installed libraries that a number can depend on."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    return found


def batch_of(model: Model, asked: int | None) -> int:
    """Pictures that are embedded at a time.

    Raises:
        UserError: less than one.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--batch {asked}: is below 1; leave it out for the usual")
    return asked or (FEW if model.preprocess.get("resize_mode") == "fit" else BATCH)


def batches(total: int, batch: int) -> Iterator[list[int]]:
    """Indices 0..total-1 in batches of exactly `batch`; the last index repeats to fill the last one up."""
    for start in tqdm(range(0, total, batch), desc="encode", unit="batch", leave=False, disable=None):
        yield [min(index, total - 1) for index in range(start, start + batch)]


def seen(model: Model, pictures: Sequence[Image.Image]) -> tuple[Any, np.ndarray]:
    """What the model makes of pictures, and which of them it refuses alone, bool [B], as Qwen's processor does what is
    more than 200 times as long as wide. A plain square stands for those, so that a batch keeps its size."""

    def refuses(picture: Image.Image) -> bool:
        try:
            model.images([picture])
        except MemoryError:  # of the machine, not of the picture
            raise
        except Exception:
            return True
        return False

    try:
        return model.images(list(pictures)), np.zeros(len(pictures), bool)
    except Exception:  # processors raise almost anything
        refused = [refuses(picture) for picture in pictures]
        if not any(refused):
            raise
        blank = Image.new("RGB", (64, 64))
        shown = [blank if bad else picture for picture, bad in zip(pictures, refused, strict=True)]
        return model.images(shown), np.array(refused)


def encode_images(
    model: Model, pictures: Pictures, *, cache: Path | None = None, batch: int | None = None
) -> np.ndarray:
    """Embeddings of all pictures, in order.

    Returns:
        float32 [N, D], unit norm; zero where the model refuses the picture.

    Raises:
        UserError: NaN, infinite or collapsed embeddings.
    """

    def compute(indices: list[int]) -> "Tensor":
        pixels, refused = seen(model, [pictures[index] for index in indices])
        embeddings = model.embed_images(pixels)
        embeddings[refused] = 0.0
        return embeddings

    found = encoded(model, "images", pictures.content_hash, len(pictures), compute, cache, batch_of(model, batch))
    if refused := int((~found.any(axis=1)).sum()):
        said = f"refuses {refused} of {len(pictures)} pictures, whose embeddings are zero"
        print(f"checkpoint {model.name}: {said}", flush=True)
    return found


def encode_texts(
    model: Model, texts: Sequence[str], *, cache: Path | None = None, batch: int | None = None
) -> np.ndarray:
    """Embeddings of all texts, in order; equal texts get equal rows.

    Returns:
        float32 [T, D], unit norm.

    Raises:
        UserError: NaN, infinite or collapsed embeddings.
    """
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: index for index, text in enumerate(unique)}

    def compute(indices: list[int]) -> "Tensor":
        return model.embed_texts([unique[index] for index in indices])

    found = encoded(model, "texts", config_hash(unique), len(unique), compute, cache, batch or BATCH)
    return found[[row[text] for text in texts]]


def encoded(
    model: Model,
    modality: str,
    content: str,
    total: int,
    compute: Callable[[list[int]], "Tensor"],
    cache: Path | None,
    batch: int,
) -> np.ndarray:
    identity = {
        "weights": model.weights_hash,
        "preprocess": model.preprocess,
        "modality": modality,
        "content": content,
        "batch": batch,
        "precision": "float32",
        "software": software(),
    }
    folder = cache / _key(identity) if cache else None
    if folder and (known := _cached(folder)) is not None:
        return known
    parts = []
    for indices in batches(total, batch):
        parts.append(compute(indices).float().cpu().numpy())
    embeddings = np.concatenate(parts)[:total]
    refuse_broken(embeddings, model=model.name, modality=modality)
    if folder:
        _store(folder, identity, embeddings)
    return embeddings


def refuse_broken(embeddings: np.ndarray, *, model: str, modality: str) -> None:
    """Refuse what would grade as noise or as a perfect score.

    A row that more than half of all rows equal is, to within the tolerance,
    the coordinate-wise median of all rows: counting rows near the median finds
    the collapse exactly, without comparing all pairs.

    Raises:
        UserError: some value is not finite, or more than half of the rows are one row.
    """
    total = len(embeddings)
    broken = int((~np.isfinite(embeddings)).any(axis=1).sum())
    if broken:
        raise UserError(
            f"checkpoint {model}: {broken} of {total} embeddings of {modality} are NaN or infinite; "
            "its training diverged, so grade an earlier checkpoint"
        )
    same = int((np.abs(embeddings - np.median(embeddings, axis=0)).max(axis=1) <= COLLAPSE).sum())
    if total > 1 and same > total / 2:
        raise UserError(
            f"checkpoint {model}: {same} of {total} embeddings of {modality} are one and the same vector; "
            "the model collapsed, so grade an earlier checkpoint"
        )


def _key(identity: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _cached(folder: Path) -> np.ndarray | None:
    """The stored embeddings, or None where they are absent, unfinished or damaged."""
    manifest = read_manifest(folder / "manifest.json")
    if manifest is None:
        return None
    try:
        raw = (folder / "embeddings.npy").read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.blake2b(raw, digest_size=8).hexdigest() != manifest["bytes_hash"]:
        return None
    return np.load(io.BytesIO(raw))


def _store(folder: Path, identity: dict[str, Any], embeddings: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, embeddings)
    raw = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".embeddings.{os.getpid()}.tmp"
    temporary.write_bytes(raw)
    os.replace(temporary, folder / "embeddings.npy")
    content = {"bytes_hash": hashlib.blake2b(raw, digest_size=8).hexdigest(), "shape": embeddings.shape}
    write_manifest(folder / "manifest.json", {**content, "identity": identity})
