"""Shape and weight of the picture, taken from the decoded pixels and not from what the json claims."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Columns `width`, `height`, `min_side` (pixels), `aspect` (longer / shorter), `image_bytes`, `image_format`."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {
            "width": pa.int32(),
            "height": pa.int32(),
            "min_side": pa.int32(),
            "aspect": pa.float32(),
            "image_bytes": pa.int64(),
            "image_format": pa.string(),
        }

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "ImageShape":
        return self

    def see(self, sample: Decoded) -> tuple[int, int, int, float, int, str]:
        width, height = sample.image.size
        short, long = min(width, height), max(width, height)
        return width, height, short, long / short, len(sample.raw), sample.image_format

    def columns(self, seen: Sequence[tuple[int, int, int, float, int, str]]) -> dict[str, pa.Array]:
        values = zip(*seen, strict=True)
        return {c: pa.array(v, t) for (c, t), v in zip(self.schema("").items(), values, strict=True)}
