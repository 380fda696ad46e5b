"""Drop pictures that are in an evaluation set, or too near to one: what is trained on must not be what grades.

Equal bytes, near perceptual hashes and near embeddings are three nets of growing
width. Hashes that differ in at most d bits agree in one of d + 1 bands of their
bits, so only reference hashes of the same band are compared, and none is
missed. Embeddings are searched by FAISS in float32, whose last bits hang on how
many rows are asked at once; whatever it finds just below the bound is therefore
compared again in float64, and the verdict is that of float64 however the pool
is cut.

Every worker reads the reference for itself; the process that decides only
learns how many pictures it has.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.selection import clustering
from curation.selection.interface import Apart, Fold, Program
from curation.selection.reference_quantile import identities, read_reference, reference_content

BITS = 64
BLOCK = 8_192  # embeddings of either side that are compared at once
ROUNDING = 5e-4  # twice what float32 can be off in a dot product of unit vectors of width 4,000

Bands = list[tuple[np.ndarray, np.ndarray]]
"""For each band of bits: (its values, sorted; the hashes in that order), both uint64 [R]"""
Identities = set[tuple[bytes, ...]]


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """Drop what equals a picture of `reference` in `image_sha256`, or is near to one by either measure. A missing value
    is near to nothing.

    `reference`: an OUT folder with a finished measure of the evaluation pictures by the same recipe.
    `phash_bits`: drop at a Hamming distance of at most this (0 to 15) in `phash`; null: do not compare.
    `cosine`: drop at a cosine of at least this, in (0, 1], in the embeddings of `column`; null: do not compare.

    Memory: hashes and float16 embeddings of the reference, in every worker.
    """

    reference: str
    phash_bits: int | None = 4
    cosine: float | None = None
    column: str = "clip_image_embedding"
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if self.phash_bits is not None and not 0 <= self.phash_bits <= 15:
            raise UserError(
                f"decontamination: phash_bits {self.phash_bits} is not in 0..15; unrelated hashes differ in about 32"
            )
        if self.cosine is not None and not 0 < self.cosine <= 1:
            raise UserError(f"decontamination: cosine {self.cosine} is not in (0, 1]; copies have cosines near 1")

    def content(self) -> str:
        return reference_content(self.reference)

    @property
    def needs(self) -> tuple[str, ...]:
        near = [("phash", self.phash_bits), (self.column, self.cosine)]
        return ("image_sha256", *(column for column, bound in near if bound is not None))

    def decide(self) -> Program:
        """{"there": the reference, "pictures": how many distinct ones it has}"""
        measured = yield Fold(self._identity, set.union)
        there = _Reference(self, measured or set())
        return {"there": there, "pictures": (yield Apart(there.pictures))}

    def _identity(self, table: pa.Table) -> Identities:
        return {identities(table.schema, self.needs)}

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        if not table.num_rows:
            return np.zeros(0, bool)
        there = decision["there"]
        keep = ~pc.is_in(table["image_sha256"], value_set=there.digests).to_numpy()
        if self.phash_bits is not None:
            asked = table["phash"].is_valid().to_numpy()
            keep[asked] &= ~within_bits(table["phash"].drop_null().to_numpy(), there.bands, self.phash_bits)
        if self.cosine is not None:
            asked = keep & table[self.column].is_valid().to_numpy()
            keep[asked] = ~within_cosine(clustering.embeddings(table, self.column)[asked], there.points, self.cosine)
        return keep

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        return {"reference_pictures": decision["pictures"]}


class _Reference:
    """What the pool is compared with, each kind read where it is first asked for, once in a process."""

    def __init__(self, settings: Decontamination, measured: Identities) -> None:
        self._settings, self._measured = settings, measured

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings, "_measured": self._measured}

    def pictures(self, folder: Path) -> int:
        return len(self.digests)

    @cached_property
    def digests(self) -> pa.Array:
        """Distinct."""
        found = self._column("image_sha256").unique().drop_null()
        if not len(found):
            raise UserError(
                f"reference {self._settings.reference}: holds no pictures; measure some evaluation pictures"
            )
        return found

    @cached_property
    def bands(self) -> Bands:
        """Of the distinct hashes."""
        assert self._settings.phash_bits is not None
        return in_bands(self._column("phash").unique().drop_null().to_numpy(), self._settings.phash_bits)

    @cached_property
    def points(self) -> np.ndarray:
        """float16 [R, D]"""
        column = self._settings.column
        return clustering.embeddings(pa.table({column: self._column(column)}).drop_null(), column)

    def _column(self, name: str) -> pa.ChunkedArray:
        settings = self._settings
        parts = read_reference(settings.reference, settings.needs, self._measured)
        chunks = [chunk for part in parts for chunk in part[name].chunks]
        return pa.chunked_array(chunks) if chunks else pa.chunked_array([pa.nulls(0)])


def _bands(bits: int) -> list[tuple[np.uint64, np.uint64]]:
    """(shift, mask) of `bits` + 1 bands that are all 64 bits together."""
    edges = [BITS * n // (bits + 1) for n in range(bits + 2)]
    return [(np.uint64(low), np.uint64((1 << (high - low)) - 1)) for low, high in pairwise(edges)]


def in_bands(hashes: np.ndarray, bits: int) -> Bands:
    """The hashes (uint64 [R]) as `within_bits` wants them."""
    keyed = [((hashes >> shift) & mask, hashes) for shift, mask in _bands(bits)]
    orders = [np.argsort(keys, kind="stable") for keys, _ in keyed]
    return [(keys[order], values[order]) for (keys, values), order in zip(keyed, orders, strict=True)]


def within_bits(hashes: np.ndarray, bands: Bands, bits: int) -> np.ndarray:
    """Which of these hashes (uint64 [n]) differ in at most `bits` bits from one of `in_bands(..., bits)`: bool [n]."""
    unique, back = np.unique(hashes, return_inverse=True)
    near = np.zeros(len(unique), bool)
    for (shift, mask), (keys, values) in zip(_bands(bits), bands, strict=True):
        asked = (unique >> shift) & mask
        starts, ends = np.searchsorted(keys, asked, "left"), np.searchsorted(keys, asked, "right")
        for i in np.flatnonzero((starts < ends) & ~near):
            near[i] = (np.bitwise_count(values[starts[i] : ends[i]] ^ unique[i]) <= bits).any()
    return near[back]


def within_cosine(points: np.ndarray, reference: np.ndarray, cosine: float) -> np.ndarray:
    """Which points have a cosine of at least `cosine`, in float64, to a row of the reference.

    Args:
        points: [n, D], of any float type; `reference`: [R, D]. float16 has moved both off norm 1.

    Returns:
        bool [n].
    """
    if len(points) > BLOCK:  # which in float64 take several times what they take in the store
        blocks = [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]
        return np.concatenate([within_cosine(block, reference, cosine) for block in blocks])
    exact = _unit(points)
    near = np.zeros(len(points), bool)
    for start in range(0, len(reference), BLOCK):
        asked = np.flatnonzero(~near)
        if not len(asked):
            break
        block = _unit(reference[start : start + BLOCK])
        nearest = clustering.nearest(exact[asked], block.astype(np.float32))
        found = (exact[asked] * block[nearest]).sum(axis=1)
        near[asked] = found >= cosine
        for i in asked[(found < cosine) & (found >= cosine - ROUNDING)]:
            near[i] = ((block * exact[i]).sum(axis=1) >= cosine).any()
    return near


def _unit(points: np.ndarray) -> np.ndarray:
    """Rows of norm 1: float64 [n, D]."""
    exact = points.astype(np.float64)
    return exact / np.sqrt((exact * exact).sum(axis=1, keepdims=True))
