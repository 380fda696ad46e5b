"""A second caption for each picture, and how well it fits: BLIP's bootstrapping (Li et al. 2022, arXiv 2201.12086).

BLIP's captioner writes a caption of every web picture, and its filter keeps of
the two what fits. Here the caption is the likeliest one, found by beam search
(three beams, 5 to 20 tokens, as BLIP's captioning demo), and the filter is a
CLIPScore beside that of the original caption: the recipe compares or cuts. A
shard keeps both texts, and training may mix them (`loader.captions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation.captioner import HUGGINGFACE, captioner_content, check_asked, load_captioner
from curation.device import Device, device_content
from curation.signals.clip import Clip
from curation.signals.interface import Decoded


@dataclass(frozen=True, kw_only=True)
class Recaption:
    """Column NAME (string), and with `clip` NAME_score (float32): the cosine of the picture and its new caption.

    `model`, `captioner`, `device`: as the signal `captions` has them. `clip`, `clip_pretrained`: `model` and
    `pretrained` of the signal `clip`.
    """

    model: str
    captioner: str = HUGGINGFACE
    beams: int = 3
    min_tokens: int = 5
    max_tokens: int = 20
    clip: str | None = None
    clip_pretrained: str | None = None
    device: Device = "cpu"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        check_asked("recaption", {"beams": self.beams}, self.min_tokens, self.max_tokens)

    def scorer(self) -> Clip | None:
        return Clip(model=self.clip, pretrained=self.clip_pretrained, device=self.device) if self.clip else None

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.string(), **({f"{name}_score": pa.float32()} if self.clip else {})}

    def content(self) -> dict[str, Any]:
        asked = [self.beams, self.min_tokens, self.max_tokens]
        scorer = self.scorer()
        clip = {"clip": scorer.content()} if scorer else {}
        how = {"asked": asked, **device_content(self.device)}
        return {**captioner_content(self.captioner, self.model), **how, **clip}

    def load(self, name: str) -> "RecaptionMeter":
        return RecaptionMeter(self, name)


class RecaptionMeter:
    def __init__(self, settings: Recaption, name: str) -> None:
        self._captioner = load_captioner(settings.captioner, settings.model, settings.device)
        scorer = settings.scorer()
        self._scorer = scorer.load(name) if scorer else None
        self._settings, self._name = settings, name

    def see(self, sample: Decoded) -> tuple[Any, Any]:
        return self._captioner.pixels(sample.image), self._scorer.see(sample)[0] if self._scorer else None

    def columns(self, seen: Sequence[tuple[Any, Any]]) -> dict[str, pa.Array]:
        pixels, scored = zip(*seen, strict=True)
        s = self._settings
        texts = self._captioner.best(pixels, beams=s.beams, min_tokens=s.min_tokens, max_tokens=s.max_tokens)
        columns = {self._name: pa.array(texts, pa.string())}
        if self._scorer:
            scores_b = (self._scorer.images(scored) * self._scorer.texts(texts)).sum(dim=1)
            columns[f"{self._name}_score"] = pa.array(scores_b.numpy(), pa.float32())
        return columns
