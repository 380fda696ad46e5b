"""What a sample of kind `rows` is: a query and what it should find, each a text, a picture, or both."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

IMAGE = "<|image_1|>"
"""Where a text shows its picture, as MMEB-train writes it (TIGER-Lab/MMEB-train)."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One side: a text, a picture, or both."""

    text: str = ""
    image: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A query and what it should find: the positive, then hard negatives."""

    query: Item
    positive: Item
    negatives: Sequence[Item] = field(default_factory=tuple)
