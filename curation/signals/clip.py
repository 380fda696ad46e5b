"""CLIPScore: the cosine of image and caption under any open_clip model, and the image embedding for clustering.

The model is a name that open_clip knows with a pretrained tag, an open_clip
model config (JSON) with a checkpoint file, a model of the Hugging Face hub
(hf-hub:ORGANISATION/NAME), or a folder in open_clip's layout, such as the export
of a CLIP that `gemsmith train` made on a small trusted set: the
data-filtering-network recipe. Preprocessing is the model's own evaluation
transform (of weights in a file: that of their architecture's published ones),
scoring is fp32 on one thread, so the score is what open_clip called by hand
gives, on any number of workers.

Heads on the image embedding (LAION's aesthetic predictors, any linear probe)
are judged in the same breath, since the embedding is there. So is T-MARS's
score of the picture without the text on it: the caption is encoded already, and
a picture without text has its own score once more.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.device import Device, device_content, torch_device
from curation.errors import UserError, one_line
from curation.hashing import file_hash
from curation.images import check_strip
from curation.preprocess import HUB, LOCAL, check_activation, preprocess_of
from curation.signals.interface import Decoded
from curation.signals.text_regions import detector_content, detector_name, masked, text_finder


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Columns NAME (float32, in [-1, 1]), NAME without "_score" + "_image_embedding" (float16 [D], unit norm), and
    for each head NAME without "_score" + "_" + the head's name (float32); with `mask_text`, NAME without "_score" +
    "_masked_score" (float32), T-MARS's.

    `model`: a name of `open_clip.list_models()` or the path of a model config (.json); or hf-hub:... or a folder
    with open_clip_config.json and its weights, which need no `pretrained`.
    `pretrained`: a tag of `open_clip.list_pretrained()`, or the path of a checkpoint.
    `heads`: name -> checkpoint of linear layers D -> ... -> 1 on the unit embedding, applied one after the other in
    the file's order, as in LAION's sa_0_4_vit_l_14_linear and sac+logos+ava1-l14-linearMSE (no activations there).
    `mask_text`: a text detector as the signal `text_regions` has it ("builtin", or package.module:function).
    `text_embedding`: the caption's embedding too, NAME without "_score" + "_text_embedding" (float16 [D], unit norm).
    `device`: "cpu", or "cuda" for a share of a GPU.
    """

    model: str
    pretrained: str | None = None
    heads: dict[str, str] = field(default_factory=dict)
    mask_text: str | None = None
    text_embedding: bool = False
    device: Device = "cpu"
    version: ClassVar[int] = 1

    def schema(self, name: str) -> dict[str, pa.DataType]:
        heads = {head_column(name, head): pa.float32() for head in self.heads}
        without_text = {masked_column(name): pa.float32()} if self.mask_text else {}
        columns = [embedding_column(name), *([text_column(name)] if self.text_embedding else [])]
        embedding = dict.fromkeys(columns, pa.list_(pa.float16(), self._width()))
        return {name: pa.float32(), **embedding, **heads, **without_text}

    def content(self) -> dict[str, Any]:
        heads = {head: _file_or_name(file) for head, file in self.heads.items()}
        more: dict[str, Any] = {"heads": heads} if heads else {}
        if self.mask_text:
            more["mask_text"] = detector_content(self.mask_text)
        if self.text_embedding:
            more["text_embedding"] = True
        return {**self._model_content(), **more, **device_content(self.device)}

    def made_by(self) -> str:
        model = Path(self.model).name if _looks_like_path(self.model) and not self.model.startswith(HUB) else self.model
        weights = f" {Path(self.pretrained).name}" if self.pretrained else ""
        return f"open_clip's {model}{weights}" + (f"; {detector_name(self.mask_text)}" if self.mask_text else "")

    def _model_content(self) -> dict[str, Any]:
        if Path(self.model).is_dir():
            return {"model": file_hash(sorted(p for p in Path(self.model).iterdir() if p.is_file()))}
        if self.model.startswith(HUB):
            return {"model": self.model}
        if self.pretrained is None:
            raise UserError(f"clip {self.model}: has no `pretrained`; name a tag of open_clip or a checkpoint file")
        own = {"model": _file_or_name(self.model), "pretrained": _file_or_name(self.pretrained)}
        return own | ({"preprocess": look} if (look := self._look()) else {})

    def _look(self) -> dict[str, Any]:
        """Of weights in a file, how their architecture sees pictures; open_clip would take OpenAI's way for any."""
        if self.pretrained is None or not _looks_like_path(self.pretrained) or self.model.startswith(HUB):
            return {}
        found = preprocess_of(Path(self.model).stem if self.model.endswith(".json") else self.model, None)
        return {} if found == preprocess_of("", None) else found

    def load(self, name: str) -> "ClipMeter":
        return ClipMeter(self, name)

    def _width(self) -> int:
        """The embedding's width, from the model config alone.

        Raises:
            UserError: open_clip has no such model, or not with these weights,
                or the file is no model config.
        """
        folder = Path(self.model).is_dir()
        if folder or self.model.endswith(".json"):
            file = Path(self.model) / "open_clip_config.json" if folder else Path(self.model)
            try:
                config = json.loads(file.read_text())
                return int((config["model_cfg"] if folder else config)["embed_dim"])
            except FileNotFoundError:
                raise UserError(f"clip model {file}: no such file; name an open_clip model config") from None
            except (ValueError, KeyError, TypeError):
                raise UserError(f"clip model {file}: not an open_clip model config (JSON with embed_dim)") from None
        if _looks_like_path(self.model) and not self.model.startswith(HUB):
            raise UserError(f"clip model {self.model}: no such folder; name one in open_clip's layout, or a model")
        import open_clip

        try:
            known = open_clip.get_model_config(self.model)
        except Exception as reason:  # of the hub and of the network
            line = one_line(reason)
            raise UserError(
                f"clip model {self.model}: cannot be read from the hub ({line}); check name and network"
            ) from None
        if known is None:
            raise UserError(f"clip model {self.model}: unknown to open_clip; see open_clip.list_models()")
        check_activation(self.model, self.pretrained, f"clip model {self.model}")
        return int(known["embed_dim"])


def embedding_column(name: str) -> str:
    """The column of the image embedding that belongs to the score column `name`."""
    return name.removesuffix("_score") + "_image_embedding"


def text_column(name: str) -> str:
    """The column of the caption's embedding that belongs to the score column `name`."""
    return name.removesuffix("_score") + "_text_embedding"


def masked_column(name: str) -> str:
    """The column of the score without text that belongs to the score column `name`."""
    return name.removesuffix("_score") + "_masked_score"


def head_column(name: str, head: str) -> str:
    """The column of a head that belongs to the score column `name`."""
    return f"{name.removesuffix('_score')}_{head}"


def _looks_like_path(value: str) -> bool:
    return "/" in value or Path(value).suffix in {".json", ".pt", ".pth", ".bin", ".safetensors"}


def _file_or_name(value: str) -> str:
    """Files go into the identity by content, so that a moved checkpoint is the same and a retrained one is not."""
    if not _looks_like_path(value):
        return value
    if not Path(value).is_file():
        raise UserError(
            f"clip {value}: no such file; name an existing checkpoint or model config, or a tag of open_clip"
        )
    return file_hash([Path(value)])


def _affine(head: str, file: str, width: int) -> tuple[Any, float]:
    """The chain of linear layers in a checkpoint as one: (weight fp32 [D], bias).

    Raises:
        UserError: not a checkpoint of linear layers from D to 1.
    """
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = [tensor.double() for key, tensor in state.items() if key.endswith("weight")]
        biases = [tensor.double() for key, tensor in state.items() if key.endswith("bias")]
        weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for w, b in zip(weights, biases, strict=True):
            weight, bias = w @ weight, w @ bias + b
        (row,), (offset,) = weight, bias
    except Exception as reason:  # of unpickling, of shapes
        line = one_line(reason, 200)
        raise UserError(
            f"clip heads.{head} {file}: no chain of linear layers {width} -> ... -> 1 ({line}); "
            "name a head that was trained on this model's embeddings"
        ) from None
    return row.float(), float(offset)


class ClipMeter:
    def __init__(self, settings: Clip, name: str) -> None:
        import open_clip
        import torch

        self._device = torch_device(settings.device, f"clip {settings.model}")
        architecture = f"{LOCAL}{settings.model}" if Path(settings.model).is_dir() else settings.model
        if architecture.endswith(".json"):
            open_clip.add_model_config(Path(architecture))
            architecture = Path(architecture).stem
        try:
            model, _, self._transform = open_clip.create_model_and_transforms(
                architecture,
                pretrained=settings.pretrained,
                precision="fp32",
                require_pretrained=True,
                **{f"image_{name}": value for name, value in settings._look().items()},
            )
            text = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
            # The folder's config would decide for itself whether a tokenizer's own code runs.
            said = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
            self._tokenizer = open_clip.get_tokenizer(architecture, **said)
        except Exception as reason:
            line = one_line(reason)
            raise UserError(
                f"clip {settings.model} with pretrained={settings.pretrained}: cannot load the weights ({line}); "
                "check the pair, or give a checkpoint file where there is no network"
            ) from reason
        self._model = model.eval().to(self._device)
        looks = model.visual.preprocess_cfg
        high, wide = (looks["size"],) * 2 if isinstance(looks["size"], int) else looks["size"]
        self._covered = (wide, high) if looks["resize_mode"] == "shortest" else None
        width = settings._width()
        self._heads = {head_column(name, head): _affine(head, file, width) for head, file in settings.heads.items()}
        self._finder = text_finder(settings.mask_text) if settings.mask_text else None
        self._name, self._keeps_text = name, settings.text_embedding
        self._torch = torch

    def see(self, sample: Decoded) -> tuple[Any, str, Any]:
        """Pixels, caption, and the pixels without text where there is some to be masked."""
        without_text = None
        if self._finder is not None and len(boxes := self._finder(sample)):
            without_text = self.pixels(masked(sample.image, boxes))
        return self.pixels(sample.image), sample.caption, without_text

    def pixels(self, image: Image.Image) -> Any:
        """The picture as the model's evaluation transform has it: fp32 [3, S, S].

        Raises:
            StripTooLong: it would be gigabytes on the way there.
        """
        if self._covered:
            check_strip(image, self._covered)
        return self._transform(image)

    def images(self, pixels: Sequence[Any]) -> Any:
        """Unit embeddings of what `pixels` gave: [B, D]."""
        with self._torch.inference_mode():
            return self._model.encode_image(self._torch.stack(list(pixels)).to(self._device), normalize=True).cpu()

    def texts(self, captions: Sequence[str]) -> Any:
        """Unit embeddings of texts, each cut at the model's context: [B, D]."""
        with self._torch.inference_mode():
            return self._model.encode_text(self._tokenizer(list(captions)).to(self._device), normalize=True).cpu()

    def columns(self, seen: Sequence[tuple[Any, str, Any]]) -> dict[str, pa.Array]:
        pixels, captions, without_text = zip(*seen, strict=True)
        image_bd, text_bd = self.images(pixels), self.texts(captions)
        judged_b = {column: image_bd @ weight_d + bias for column, (weight_d, bias) in self._heads.items()}
        judged_b[self._name] = (image_bd * text_bd).sum(dim=1)
        if self._finder is not None:
            scores_b = judged_b[self._name].clone()
            rows = [row for row, pixels in enumerate(without_text) if pixels is not None]
            if rows:
                masked_rd = self.images([without_text[row] for row in rows])
                scores_b[rows] = (masked_rd * text_bd[rows]).sum(dim=1)
            judged_b[masked_column(self._name)] = scores_b
        vectors = {
            embedding_column(self._name): image_bd,
            **({text_column(self._name): text_bd} if self._keeps_text else {}),
        }
        return {
            **{column: pa.array(values.numpy(), pa.float32()) for column, values in judged_b.items()},
            **{column: _halves(values.numpy()) for column, values in vectors.items()},
        }


def _halves(values: np.ndarray) -> pa.Array:
    """Vectors [B, D] as a column of float16."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).reshape(-1)), values.shape[1])
