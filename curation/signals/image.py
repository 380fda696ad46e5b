"""Shape and weight of the picture, of the decoded pixels and not of what the json claims; unless its original is asked
for, whose size DataComp judges, though what img2dataset has stored is often smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.signals.fields import typed
from curation.signals.interface import Decoded

LARGEST = 2**31 - 1  # of a side, in pixels


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Columns `width`, `height`, `min_side` (pixels), `aspect` (longer / shorter), `image_bytes`, `image_format`.

    `original`: `min_side` and `aspect` are of the json's original_width and original_height, where both are whole
    numbers above 0, 512.0 too, since pandas makes floats of a column in which one is missing. `width` and `height` are
    of the decoded picture in any case.
    """

    original: bool = False
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
        return {"original": 2} if self.original else {}  # goes up with what counts as an original size

    def load(self, name: str) -> "ImageShape":
        return self

    def see(self, sample: Decoded) -> tuple[int, int, int, float, int, str]:
        width, height = sample.image.size
        judged = _original(sample.record) if self.original else None
        short, long = sorted(judged or (width, height))
        return width, height, short, long / short, len(sample.raw), sample.image_format

    def columns(self, seen: Sequence[tuple[int, int, int, float, int, str]]) -> dict[str, pa.Array]:
        values = zip(*seen, strict=True)
        return {c: pa.array(v, t) for (c, t), v in zip(self.schema("").items(), values, strict=True)}


def _original(record: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = (_whole(record.get(f"original_{side}")) for side in ("width", "height"))
    if width is None or height is None or not (0 < width <= LARGEST and 0 < height <= LARGEST):
        return None
    return width, height


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, float) and value.is_integer() else typed(value, "int64")
