"""SIEVE: does the caption say what a captioner sees? (Mahmoud et al. 2023, arXiv 2310.02110)

    score = max over the n drawn captions of  cos(E(strip(caption)), E(strip(drawn)))

E is a sentence encoder (all-MiniLM-L6-v2: mean of the last layer over the real
tokens, unit norm). Both sides lose phrases that speak of the medium, so that "a
photo of" matches nothing. As published the phrases are taken out wherever they
stand, one after the other, in words too ("photographer" leaves "grapher");
`strip: word` takes them out as whole words. Where nothing is left of the best
drawn caption, the score is 0, as published.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from curation.device import Device, torch_device
from curation.errors import UserError, one_line
from curation.hashing import file_hash
from curation.signals.captions import Captions, CaptionsMeter
from curation.signals.interface import Decoded

PHRASES = ("an image of", "a photo of", "stock photo", "photo stock", "a photo", "an image", "image", "photo")
TOKENS = 256  # of a text that the encoder reads, as all-MiniLM-L6-v2 is set up


@dataclass(frozen=True, kw_only=True)
class Sieve(Captions):
    """Columns NAME (float32, in [-1, 1]) and NAME without "_score" + "_captions" (list<string>, as drawn).

    The settings of `captions`, and `encoder`: a sentence encoder of the hub or a folder; `strip`: "sieve" or "word".
    """

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    strip: Literal["sieve", "word"] = "sieve"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("image", "caption")

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.float32(), drawn_column(name): pa.list_(pa.string())}

    def content(self) -> dict[str, Any]:
        files = sorted(p for p in Path(self.encoder).iterdir() if p.is_file()) if Path(self.encoder).is_dir() else []
        encoder = file_hash(files) if files else self.encoder
        return {**super().content(), "encoder": encoder, "strip": self.strip}

    def load(self, name: str) -> "SieveMeter":  # type: ignore[override]
        return SieveMeter(self, name)


def drawn_column(name: str) -> str:
    """The column of the drawn captions that belongs to the score column `name`."""
    return name.removesuffix("_score") + "_captions"


def strip_phrases(text: str, how: Literal["sieve", "word"]) -> str:
    """The text without SIEVE's phrases, whatever their case."""
    for phrase in PHRASES:
        text = re.sub(phrase if how == "sieve" else rf"\b{phrase}\b", "", text, flags=re.IGNORECASE)
    return text


class SentenceEncoder:
    """Sentences -> unit vectors [R, D], by the mean over real tokens of a transformer's last layer."""

    def __init__(self, model: str, device: Device) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._device = torch_device(device, f"sieve encoder {model}")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model, dtype=torch.float32).eval().to(self._device)
        except Exception as reason:  # of the hub, of the network, of files
            line = one_line(reason)
            raise UserError(f"sieve encoder {model}: cannot be loaded ({line}); check name and network") from None

    def __call__(self, sentences: Sequence[str]) -> Any:
        import torch

        batch = self._tokenizer(
            list(sentences), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            hidden_rtd = self._model(**batch).last_hidden_state
            real_rt1 = batch["attention_mask"][..., None].float()
            mean_rd = (hidden_rtd * real_rt1).sum(dim=1) / real_rt1.sum(dim=1)
            return torch.nn.functional.normalize(mean_rd, dim=1).cpu()


class SieveMeter:
    def __init__(self, settings: Sieve, name: str) -> None:
        self._captions = CaptionsMeter(settings, name)
        self._encoder = SentenceEncoder(settings.encoder, settings.device)
        self._strip, self._name = settings.strip, name

    def see(self, sample: Decoded) -> tuple[Any, str]:
        return self._captions.see(sample), sample.caption

    def columns(self, seen: Sequence[tuple[Any, str]]) -> dict[str, pa.Array]:
        pictures, captions = zip(*seen, strict=True)
        drawn = self._captions.write(pictures)
        stripped = [[strip_phrases(text, self._strip) for text in texts] for texts in drawn]
        said_bd = self._encoder([strip_phrases(caption, self._strip) for caption in captions])
        seen_bnd = self._encoder([text for texts in stripped for text in texts]).unflatten(0, (len(drawn), -1))
        best_b, place_b = (seen_bnd @ said_bd[..., None])[..., 0].max(dim=1)
        scores = [
            float(best) if texts[place] else 0.0 for best, place, texts in zip(best_b, place_b, stripped, strict=True)
        ]
        return {
            self._name: pa.array(scores, pa.float32()),
            drawn_column(self._name): pa.array(drawn, pa.list_(pa.string())),
        }
