"""What turns pictures and texts into a family's inputs, saved beside its weights: transformers' processors.

    inputs = processor(images=pictures)            pixel_values                  for model.get_image_features(**inputs)
    inputs = processor(text=texts)                 input_ids, attention_mask     for model.get_text_features(**inputs)
    texts = processor.batch_decode(ids, skip_special_tokens=True)                of model.generate(**inputs)

Grading goes through these too (training/inference.py), so a model that was
taken away embeds exactly what was graded. Pictures go through open_clip's own
evaluation transform (Pillow, unscaled decoding): transformers' image processors
resize tensors and give other pixels.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from curation.manifest import write_json
from training.config import TrainConfig
from training.families import Family
from training.models.flava_batch import encode, padded
from training.models.vlm_inputs import Inputs, Item, instruct
from training.tokenizer import EMB, caption_ids

Pictures = Image.Image | Sequence[Image.Image]
Texts = str | Sequence[str]


class PairProcessor(ProcessorMixin, ABC):
    """Square pictures and texts, each on its own. A kind says by `ids` what its text encoder reads."""

    FILE = "processor_config.json"

    def __init__(
        self,
        tokenizer: Any,
        size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        resize_mode: str,
        max_tokens: int,
        interpolation: str = "bicubic",
    ) -> None:
        """
        Args:
            size: side of the model's input · image_mean, image_std: of RGB values in [0, 1] ·
                resize_mode: "squash" keeps the whole picture, "shortest" its centre square ·
                max_tokens: of a text, what is added to it included · interpolation: bicubic or bilinear.
        """
        super().__init__(tokenizer)
        self._keep(size, image_mean, image_std, resize_mode, interpolation, max_tokens)

    def _keep(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize_mode: str,
        interpolation: str,
        max_tokens: int,
    ) -> None:
        self.size, self.image_mean, self.image_std = size, list(mean), list(std)
        self.resize_mode, self.interpolation, self.max_tokens = resize_mode, interpolation, max_tokens

    @cached_property
    def _transform(self) -> Any:
        from open_clip.transform import image_transform

        return image_transform(
            self.size,
            is_train=False,
            mean=tuple(self.image_mean),
            std=tuple(self.image_std),
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
        )

    @abstractmethod
    def ids(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """input_ids [B, T], and what else the text encoder reads."""

    def __call__(self, images: Pictures | None = None, text: Texts | None = None, return_tensors: str = "pt") -> Any:
        """pixel_values [B, 3, S, S] of pictures, input_ids and attention_mask [B, T] of texts, or both."""
        found: dict[str, torch.Tensor] = {}
        if images is not None:
            # First of all RGB, as training and grading decode: a palette could not be resized smoothly.
            rgb = [picture.convert("RGB") for picture in _several(images)]
            found["pixel_values"] = torch.stack([self._transform(picture) for picture in rgb])
        if text is not None:
            found |= self.ids(_several(text))
        return BatchFeature(found, tensor_type=return_tensors)


class MMGemProcessor(PairProcessor):
    """caption [EMB], padded on the right."""

    def ids(self, texts: list[str]) -> dict[str, torch.Tensor]:
        end = self.tokenizer.convert_tokens_to_ids(EMB)
        rows = [[*row, end] for row in caption_ids(self.tokenizer, texts, self.max_tokens - 1)]
        return _masked(rows, self.tokenizer.pad_token_id)


class FlavaProcessor(PairProcessor):
    """[CLS] caption [SEP], padded on the right."""

    def ids(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return _masked(encode(self.tokenizer, texts, self.max_tokens)[0], self.tokenizer.pad_token_id)


class ClipProcessor(PairProcessor):
    """open_clip's own tokenizer, which needs no file, or the Hugging Face one beside the weights (SigLIP's): input_ids
    [B, max_tokens] and no mask.

    words: the architecture's `text_cfg` where it says more of its tokenizer than a length.
    """

    def __init__(
        self,
        size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        resize_mode: str,
        max_tokens: int,
        interpolation: str = "bicubic",
        words: dict[str, Any] | None = None,
    ) -> None:
        # Not PairProcessor's: transformers would look for the files of a tokenizer.
        ProcessorMixin.__init__(self)
        self._keep(size, image_mean, image_std, resize_mode, interpolation, max_tokens)
        self.words = words
        self._folder: Path | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **settings: Any) -> Self:
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **settings)
        found._folder = Path(pretrained_model_name_or_path)
        return found

    def save_pretrained(self, save_directory: Any, *args: Any, **settings: Any) -> Any:
        if hasattr(self._tokenizer, "save_pretrained"):  # open_clip looks for its files there, too
            self._tokenizer.save_pretrained(str(save_directory))
        return super().save_pretrained(save_directory, *args, **settings)

    @cached_property
    def _tokenizer(self) -> Any:
        from training.models.clip_words import words_of

        return words_of(self.words or {"context_length": self.max_tokens}, self._folder)

    def ids(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokenizer(texts)}

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Of CoCa's token ids."""
        return self._tokenizer.batch_decode(*args, **kwargs)


class Vlm2VecProcessor:
    """Around the backbone's own processor: pictures with the recipe's instruction, texts, or both as one input each."""

    FILE = "vlm2vec_processor.json"

    def __init__(
        self, backbone: Any, config: Any, *, instruction: str, max_tokens: int, longest: int | None = None
    ) -> None:
        """backbone: the VLM's processor, with which its `generate` is prompted · config: the VLM's ·
        longest: pixels of a picture's longest side, above which it is scaled down; None: it is left as it is."""
        self.backbone, self.tokenizer = backbone, backbone.tokenizer
        self._settings = {"instruction": instruction, "max_tokens": max_tokens, "longest": longest}
        self.instruction = instruction
        self._inputs = Inputs(backbone, config, max_tokens=max_tokens, longest=longest)

    def __call__(self, images: Pictures | None = None, text: Texts | None = None, return_tensors: str = "pt") -> Any:
        """The backbone's inputs, a row each: of a picture asked for its caption, of a text, or of a picture with its
        text, which then stands in place of the instruction."""
        assert images is not None or text is not None, "give pictures, texts, or both"
        pictures, texts = (None if side is None else _several(side) for side in (images, text))
        if pictures is None:
            items = [Item(text=words) for words in texts or []]
        else:
            words = texts or [instruct(self.instruction, image=True)] * len(pictures)
            items = [Item(text=line, image=picture) for line, picture in zip(words, pictures, strict=True)]
        return BatchFeature(self._inputs.side(items, picture=False), tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        self.backbone.save_pretrained(str(folder))
        write_json(Path(folder) / self.FILE, self._settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Self:
        """Of a folder that `save_pretrained`, and the model's, wrote."""
        from training.models.vlm2vec import Vlm2VecConfig, backbone_config

        backbone = AutoProcessor.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        config = Vlm2VecConfig.from_pretrained(str(folder))
        config.trust_remote_code = trust_remote_code
        return cls(backbone, backbone_config(config), **json.loads((Path(folder) / cls.FILE).read_text()))


def _several(one_or_more: Any) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, str | Image.Image) else list(one_or_more)


def _masked(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    mask = padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": padded(rows, pad), "attention_mask": mask}


def processor_of(config: TrainConfig, family: Family) -> Any:
    """The processor of a run's family."""
    tokens = config.loader.max_tokens
    if config.vlm2vec is not None:
        settings, longest = family.model.backbone.config, config.loader.decode_size
        said: dict[str, Any] = {"instruction": config.vlm2vec.instruction, "max_tokens": tokens, "longest": longest}
        return Vlm2VecProcessor(family.tokenizer, settings, **said)
    spec = family.image
    pictures: dict[str, Any] = {"size": spec.size, "image_mean": spec.mean, "image_std": spec.std}
    pictures |= {"resize_mode": spec.resize_mode, "interpolation": spec.interpolation}
    if config.clip is not None:
        text_cfg = family.model.model_cfg["text_cfg"]
        words = text_cfg if {"hf_tokenizer_name", "tokenizer_kwargs"} & text_cfg.keys() else None
        processor = ClipProcessor(**pictures, max_tokens=family.tokenizer.context_length, words=words)
        processor._tokenizer = family.tokenizer
        return processor
    if config.mmgem is not None:
        return MMGemProcessor(family.tokenizer, **pictures, max_tokens=config.mmgem.embed_tokens or tokens)
    return FlavaProcessor(family.tokenizer, **pictures, max_tokens=tokens)
