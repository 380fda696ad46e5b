"""Captions that a captioner draws for each picture: SIEVE's first half, and raw material for recaptioning.

SIEVE (Mahmoud et al. 2023, arXiv 2310.02110) draws eight captions a picture by
BLIP with nucleus sampling (0.9 of the probability, of the 50 likeliest words,
which was its library's default), 5 to 20 tokens long: the defaults here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.captioner import HUGGINGFACE, captioner_content, check_asked, load_captioner
from curation.device import Device, device_content
from curation.errors import UserError
from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Column NAME (list<string>): `n` captions of each picture.

    `model`: a name of the Hugging Face hub or a folder; `captioner`: how it is loaded, "huggingface" or
    package.module:function (see `curation.captioner`). Lengths are in tokens of the model, special ones apart. Drawn by
    hash(seed, sha256 of the image file): the same picture is described in the same words wherever it occurs. `device`:
    "cpu", or "cuda" for a share of a GPU.
    """

    model: str
    captioner: str = HUGGINGFACE
    n: int = 8
    top_k: int = 50
    top_p: float = 0.9
    min_tokens: int = 5
    max_tokens: int = 20
    seed: int = 0
    device: Device = "cpu"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        check_asked("captions", {"n": self.n, "top_k": self.top_k}, self.min_tokens, self.max_tokens)
        if not 0 < self.top_p <= 1:
            raise UserError(f"captions: top_p {self.top_p} is not in (0, 1]")

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.list_(pa.string())}

    def content(self) -> dict[str, Any]:
        asked = [self.n, self.top_k, self.top_p, self.min_tokens, self.max_tokens, self.seed]
        return {**captioner_content(self.captioner, self.model), "asked": asked, **device_content(self.device)}

    def load(self, name: str) -> "CaptionsMeter":
        return CaptionsMeter(self, name)


class CaptionsMeter:
    def __init__(self, settings: Captions, name: str) -> None:
        self._captioner = load_captioner(settings.captioner, settings.model, settings.device)
        self._settings, self._name = settings, name

    def see(self, sample: Decoded) -> tuple[Any, str]:
        return self._captioner.pixels(sample.image), hashlib.sha256(sample.raw).hexdigest()

    def columns(self, seen: Sequence[tuple[Any, str]]) -> dict[str, pa.Array]:
        return {self._name: pa.array(self.write(seen), pa.list_(pa.string()))}

    def write(self, seen: Sequence[tuple[Any, str]]) -> list[list[str]]:
        """The captions of each of the pictures."""
        pixels, keys = zip(*seen, strict=True)
        s = self._settings
        return self._captioner.sampled(
            pixels, keys,
            n=s.n, seed=s.seed, top_k=s.top_k, top_p=s.top_p, min_tokens=s.min_tokens, max_tokens=s.max_tokens,
        )  # fmt: skip
