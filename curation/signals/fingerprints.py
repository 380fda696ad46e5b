"""What finds copies: the sha256 of the image's bytes, and imagehash's 64-bit perceptual hash of its pixels.

The perceptual hash is the sign pattern of the 8 x 8 lowest DCT frequencies of
the 32 x 32 grey picture: a re-encoded, slightly cropped or resized copy differs
in a few bits, another picture in about 32.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Columns `image_sha256` (32 bytes) and `phash` (uint64, the first bit of imagehash's row order is the highest)."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"image_sha256": pa.binary(32), "phash": pa.uint64()}

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "FingerprintsMeter":
        return FingerprintsMeter()


class FingerprintsMeter:
    def __init__(self) -> None:
        import imagehash

        self._phash = imagehash.phash

    def see(self, sample: Decoded) -> tuple[bytes, int]:
        bits = self._phash(sample.image).hash
        return hashlib.sha256(sample.raw).digest(), int.from_bytes(np.packbits(bits).tobytes(), "big")

    def columns(self, seen: Sequence[tuple[bytes, int]]) -> dict[str, pa.Array]:
        digests, hashes = zip(*seen, strict=True)
        return {"image_sha256": pa.array(digests, pa.binary(32)), "phash": pa.array(hashes, pa.uint64())}
