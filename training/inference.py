"""A trained model for grading and use: from a sharded checkpoint or from an export, the same object.

Pictures and texts go through the family's processor (training/processor.py),
the one that exports are saved with, in fp32 on the device at hand.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curation.errors import UserError
from curation.hashing import config_hash, file_hash
from curation.manifest import read_manifest
from training import checkpoint
from training.adapters import FOLDER as ADAPTER
from training.config import TrainConfig, as_dict
from training.families import Family, build
from training.models.clip_export import OPEN_CLIP
from training.models.kind import check_whole, json_of
from training.processor import processor_of
from training.regions import Region, region_weights


def rebuild(config: TrainConfig, tokenizer: Path, made_of: dict[str, Any] | None = None) -> Family:
    """The family of a run, with fresh weights and the tokenizer of this folder.

    Args:
        made_of: of its model (families.py); without it, what the recipe names is opened again.
    """

    def no_captions() -> list[str]:
        raise UserError(f"tokenizer: {tokenizer} is missing; copy it from where the run was made")

    return build(config, tokenizer, no_captions, made_of)


@dataclass(slots=True)
class Model:
    """What evaluation needs of a model; every method runs without a graph.

    weights_hash and preprocess name exactly what was used: they are part of every cache key.
    """

    name: str
    step: int | None
    weights_hash: str
    preprocess: dict[str, Any]
    can_caption: bool
    family: Family
    processor: Any
    device: torch.device

    def images(self, pictures: list[Image.Image]) -> Any:
        """[B, 3, S, S], or the tensors of a family whose pictures are not squares of one size."""
        found = self.processor(images=pictures)
        return found["pixel_values"] if list(found) == ["pixel_values"] else dict(found)

    @torch.no_grad()
    def embed_images(self, pixels: Any) -> torch.Tensor:
        """Unit embeddings, fp32 [B, D]."""
        model = self.family.model
        if isinstance(pixels, dict):
            return model.get_image_features(**{n: x.to(self.device) for n, x in pixels.items()}).pooler_output.cpu()
        pixels = pixels.to(self.device)
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixels).pooler_output.cpu()
        return torch.nn.functional.normalize(model.towers.encode_image(pixels).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit embeddings, fp32 [B, D]."""
        model, inputs = self.family.model, self.processor(text=texts).to(self.device)
        if hasattr(model, "get_text_features"):
            return model.get_text_features(**inputs).pooler_output.cpu()
        return torch.nn.functional.normalize(model.towers.encode_text(inputs["input_ids"]).float(), dim=-1).cpu()

    @torch.no_grad()
    def caption(self, pixels: torch.Tensor, max_new_tokens: int = 32) -> list[str]:
        """A greedy caption per image."""
        ids = self.family.model.generate(pixels.to(self.device), max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.family.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def can_regions(self) -> bool:
        """Whether it embeds and describes parts of pictures."""
        return hasattr(self.family.model, "h1")

    def region_weights(self, region: Region, size: tuple[int, int]) -> np.ndarray:
        """float32 [N]: over the patches of a picture of this (width, height). Raises ValueError where the model sees
        nothing of it."""
        return region_weights(region, size, self.family.image.grid, self.preprocess["resize_mode"])

    @torch.no_grad()
    def feature_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, N, Dv], on the device."""
        return self.family.model.feature_map(pixels.to(self.device))

    @torch.no_grad()
    def embed_regions(self, maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Unit embeddings, fp32 [B, D], of a region [B, N] of each feature map [B, N, Dv]."""
        return self.family.model.get_region_features(maps, weights).pooler_output.cpu()

    @torch.no_grad()
    def caption_regions(self, maps: torch.Tensor, weights: torch.Tensor, max_new_tokens: int = 32) -> list[str]:
        """A greedy caption of a region of each feature map."""
        ids = self.family.model.generate_region(maps, weights, max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.family.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def heat_map(self, picture: Image.Image, text: str) -> np.ndarray:
        """float32 [h, w]: the cosine of each patch with the text."""
        assert self.family.encode_query is not None
        ids = self.family.encode_query([text])["input_ids"].to(self.device)
        return self.family.model.heat_map(self.images([picture]).to(self.device), ids)[0].float().cpu().numpy()


def config_from(record: dict[str, Any]) -> TrainConfig:
    from training.config import make_parser

    parser = make_parser()
    # A copy: jsonargparse writes its own objects into the lists that it is given.
    parsed = parser.instantiate(parser.parse_object({**copy.deepcopy(record), "data": [], "out": ""}))
    return TrainConfig(**{name: getattr(parsed, name) for name in TrainConfig.__dataclass_fields__})


def load(folder: Path, embed_tokens: int | None = None, *, trust_remote_code: bool = False) -> Model:
    """Open RUN/checkpoints/step_*, or a RUN/export together with its run.

    Args:
        embed_tokens: what a text is cut to when it is embedded, instead of what the recipe says (mmgem).
        trust_remote_code: whether code that a backbone brings may run (vlm2vec). The recipe in the folder does not
            decide it: folders are handed on.

    Raises:
        UserError: no such folder, cut short, or not a checkpoint of ours; texts that it cannot read in one piece; a
            backbone with code of its own that is not trusted.
    """
    folder = folder.resolve()  # its run is the folder around it, whatever it was called by
    run, words = folder.parent, folder
    exported = sorted(set(folder.glob("*.safetensors")) - set(folder.glob("rank_*")))  # those are a checkpoint's
    if not exported:
        manifest = checkpoint.check(folder)
        config = _reading(trusting(config_from(manifest["config"]), trust_remote_code), embed_tokens)
        run = folder.parent.parent
        words = run / "tokenizer"
        family = rebuild(config, words, manifest.get("made_of"))
        family.model.load_state_dict(checkpoint.consolidated(folder))
        step, weights_hash = manifest["step"], manifest["weights_hash"]
        name = f"{run.name}/{folder.name}"
    else:
        family, config, step = _exported(folder, embed_tokens, trust_remote_code)
        weights_hash, name = file_hash(exported), f"{run.name}/{folder.name}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # in fp32 as said: convolutions alone would have ten bits, unasked
    family.model.eval().to(device)
    spec = family.image
    preprocess = {
        "size": spec.size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "resize_mode": spec.resize_mode,
        "interpolation": spec.interpolation,
        "max_tokens": config.loader.max_tokens,
        "precision": "fp32",
        "recipe": config_hash(as_dict(config)),
        "tokenizer": file_hash(sorted(words.glob("tokenizer*.json"))),
    }
    # A query's prompt asks for an embedding, not for a caption.
    can_caption = hasattr(family.model, "generate") and family.encode_images is None
    processor = processor_of(config, family)
    return Model(name, step, weights_hash, preprocess, can_caption, family, processor, device)


def trusting(config: TrainConfig, trust_remote_code: bool) -> TrainConfig:
    """A folder's recipe, with its word on code that backbones bring confirmed or taken back."""
    if config.vlm2vec is None or trust_remote_code:
        return config
    return replace(config, vlm2vec=replace(config.vlm2vec, trust_remote_code=False))


def _reading(config: TrainConfig, embed_tokens: int | None) -> TrainConfig:
    """The recipe with texts of this length."""
    if embed_tokens is None:
        return config
    if config.mmgem is None:
        raise UserError(f"--embed-tokens {embed_tokens}: {config.family} reads texts as it was trained; leave it out")
    return replace(config, mmgem=replace(config.mmgem, embed_tokens=embed_tokens))


def _exported(folder: Path, embed_tokens: int | None, trust_remote_code: bool) -> tuple[Family, TrainConfig, int]:
    """An export's family, from the recipe in it."""
    import training.auto  # noqa: F401  transformers knows the folder's kind then, and does not warn of it

    check_whole(folder, "--checkpoint")
    record = read_manifest(folder / "gemsmith.json")
    if record is None:
        raise UserError(f"--checkpoint {folder}: has no gemsmith.json; name an export that `gemsmith train` wrote")
    config = _reading(trusting(config_from(record["config"]), trust_remote_code), embed_tokens)
    made_of = export_made_of(folder)
    if config.adapter is not None and config.adapter.merge:
        config = replace(config, adapter=None)
    if made_of is None and config.adapter is not None and config.adapter.init_from is not None:
        config = replace(config, adapter=replace(config.adapter, init_from=str(folder / ADAPTER)))
    try:
        family = rebuild(config, folder, made_of)
    except UserError as error:
        if made_of is not None or config.adapter is None:
            raise
        raise UserError(
            f"--checkpoint {folder}: is an adapter alone, and what it goes into does not open ({error}); mend that, or "
            "write the run's checkpoint whole by `gemsmith export --merge`"
        ) from None
    family.model.load_state_dict(family.read_export(folder))
    return family, config, record["steps"]


def export_made_of(folder: Path) -> dict[str, Any] | None:
    """What the model of an export is made of (families.py); None of an adapter alone."""
    files = [folder / name for name in (OPEN_CLIP, "config.json")]
    return next((json_of(file, "--checkpoint") for file in files if file.exists()), None)
