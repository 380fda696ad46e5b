"""Batches from webdataset shards: sources, their order and mixture, pictures, and the threads that make chunks."""

from training.data.budget import Budget
from training.data.images import ImageSpec, decode
from training.data.loader import Drawn, Loader
from training.data.mixture import Mixture
from training.data.order import Order
from training.data.shards import REASONS, Hole, Shards, drawn_text, picture
from training.data.sources import COUNTS, Samples, Source, every_caption, fingerprint, keep_counts, named, open_sources

__all__ = [
    "COUNTS",
    "REASONS",
    "Budget",
    "Drawn",
    "Hole",
    "ImageSpec",
    "Loader",
    "Mixture",
    "Order",
    "Samples",
    "Shards",
    "Source",
    "decode",
    "drawn_text",
    "every_caption",
    "fingerprint",
    "keep_counts",
    "named",
    "open_sources",
    "picture",
]
