"""How bright a picture is and how much there is to see: blank, black and washed-out pictures have little of either."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Columns `luminance` (mean of Pillow's grey, ITU-R 601-2 luma, 0 to 1), `contrast` (its standard deviation) and
    `entropy` (Shannon's, of the histogram of 256 greys, in bits: 0 for one flat grey, at most 8)."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"luminance": pa.float32(), "contrast": pa.float32(), "entropy": pa.float32()}

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "Exposure":
        return self

    def see(self, sample: Decoded) -> tuple[float, float, float]:
        share = np.array(sample.image.convert("L").histogram(), float)
        share /= share.sum()
        greys = np.arange(256) / 255
        mean = float(share @ greys)
        present = share[share > 0]
        return mean, float(np.sqrt(share @ (greys - mean) ** 2)), float(-(present @ np.log2(present)))

    def columns(self, seen: Sequence[tuple[float, float, float]]) -> dict[str, pa.Array]:
        values = zip(*seen, strict=True)
        return {column: pa.array(v, pa.float32()) for column, v in zip(self.schema(""), values, strict=True)}
