"""Captioners: models that write captions of pictures, and how they are asked.

A captioner is three functions: what it takes from a picture, transformers'
`generate`, and what its tokens say. "huggingface" loads any image-to-text model
that generates from pixels alone (BLIP, GIT, ViT-GPT2, ...); a recipe may name
another loader as package.module:function, such as `jobs.captioner:mmgem` for a
model that was trained here. The loader takes the recipe's `model` and `device` and
returns a `Captioner`.

Sampling is by inversion: the random number of row (picture, j) at step t comes
from hash(seed, picture, j), so that captions do not depend on which pictures
share a batch, and a run that is repeated says the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from curation.device import Device, torch_device
from curation.dotted import function_content, load_function
from curation.errors import UserError, one_line
from curation.hashing import file_hash, hash64
from curation.images import check_strip

if TYPE_CHECKING:
    from torch import Tensor

HUGGINGFACE = "huggingface"
ROWS = 32  # captions that are written at once: BLIP's cross attention alone keeps 40 MB for each


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioner:
    """pixels: picture -> [3, S, S] · generate: as transformers' `generate`, ([B, 3, S, S], **settings) -> token ids
    [B * n, T] · decode: token ids [R, T] -> R texts, without special tokens."""

    pixels: Callable[[Image.Image], "Tensor"]
    generate: Callable[..., "Tensor"]
    decode: Callable[["Tensor"], list[str]]

    def best(self, pixels: Sequence["Tensor"], *, beams: int, min_tokens: int, max_tokens: int) -> list[str]:
        """The likeliest caption of each picture, by beam search (greedy with one beam)."""
        import torch

        found: list[str] = []
        for start in range(0, len(pixels), max(ROWS // beams, 1)):
            batch_b3ss = torch.stack(list(pixels[start : start + max(ROWS // beams, 1)]))
            ids = self._ids(
                batch_b3ss, num_beams=beams, do_sample=False, min_new_tokens=min_tokens, max_new_tokens=max_tokens
            )
            found += [text.strip() for text in self.decode(ids)]
        return found

    def sampled(
        self,
        pixels: Sequence["Tensor"],
        keys: Sequence[str],
        *,
        n: int,
        seed: int,
        top_k: int,
        top_p: float,
        min_tokens: int,
        max_tokens: int,
    ) -> list[list[str]]:
        """`n` captions of each picture, drawn from the likeliest `top_k` words and of these from the top `top_p`."""
        import torch

        found: list[list[str]] = []
        step = max(ROWS // n, 1)
        for start in range(0, len(pixels), step):
            batch_b3ss = torch.stack(list(pixels[start : start + step]))
            seeds = [hash64(seed, key, j) for key in keys[start : start + step] for j in range(n)]
            ids = self._ids(
                batch_b3ss,
                do_sample=True, num_beams=1, num_return_sequences=n, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=min_tokens, max_new_tokens=max_tokens,
                logits_processor=[_Draw(seeds, max_tokens, top_k, top_p)],
            )  # fmt: skip
            texts = [text.strip() for text in self.decode(ids)]
            found += [texts[row : row + n] for row in range(0, len(texts), n)]
        return found

    def _ids(self, pixels_b3ss: "Tensor", **settings: Any) -> "Tensor":
        import torch

        with torch.inference_mode():
            return self.generate(pixels_b3ss, **settings)


class _Draw:
    """A logits processor that leaves of each row the one token that its own random number picks."""

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int, top_p: float) -> None:
        self._uniform = np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])  # [R, steps]
        self._step, self._top_k, self._top_p = 0, top_k, top_p

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """Scores [R, V] -> the same with minus infinity everywhere but at the picked token."""
        import torch
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        for warper in (TopKLogitsWarper(self._top_k), TopPLogitsWarper(self._top_p)):
            scores = warper(input_ids, scores)
        cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
        uniform = torch.from_numpy(self._uniform[:, self._step]).to(scores.device)[:, None] * cumulative[:, -1:]
        self._step += 1
        picked = torch.searchsorted(cumulative, uniform, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, picked, 0.0)


def check_asked(kind: str, least: dict[str, int], min_tokens: int, max_tokens: int) -> None:
    """Raises: UserError: one of these numbers is too small, or no caption is so long."""
    for name, value in {**least, "max_tokens": max_tokens}.items():
        if value < 1:
            raise UserError(f"{kind}: {name} {value} is not at least 1")
    if not 0 <= min_tokens <= max_tokens:
        raise UserError(f"{kind}: min_tokens {min_tokens} is not in 0..{max_tokens}, its max_tokens")


def load_captioner(loader: str, model: str, device: Device = "cpu") -> Captioner:
    """The captioner that a recipe names by its `captioner` and its `model`, on its `device`.

    Raises:
        UserError: the loader cannot be imported, or the model cannot be loaded.
    """
    if loader == HUGGINGFACE:
        return huggingface(model, device)
    found = load_function("captioner", loader)(model, device)
    assert isinstance(found, Captioner), f"{loader} returned a {type(found).__name__}"
    return found


def captioner_content(loader: str, model: str) -> dict[str, Any]:
    """What decides the captions beside how they are asked for; the files of a folder go in by content.

    Raises:
        UserError: the loader's module does not exist.
    """
    files = sorted(p for p in Path(model).iterdir() if p.is_file()) if Path(model).is_dir() else []
    how = loader if loader == HUGGINGFACE else function_content("captioner", loader)
    return {"captioner": how, "model": file_hash(files) if files else model}


def huggingface(model: str, device: Device = "cpu") -> Captioner:
    """A model of the hub, or a folder of `save_pretrained`, by transformers' auto classes, in fp32.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    there = torch_device(device, f"captioner model {model}")
    try:
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval().to(there)
        processor, tokenizer = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except Exception as reason:  # of the hub, of the network, of files
        line = one_line(reason)
        raise UserError(f"captioner model {model}: cannot be loaded ({line}); check name and network") from None

    shortest = getattr(processor, "size", {}).get("shortest_edge") or 0

    def pixels(image: Image.Image) -> "Tensor":
        check_strip(image, (shortest, shortest))
        return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def generate(pixels_b3ss: "Tensor", **settings: Any) -> "Tensor":
        return network.generate(pixel_values=pixels_b3ss.to(there), **settings)

    return Captioner(
        pixels=pixels,
        generate=generate,
        decode=lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True),
    )
