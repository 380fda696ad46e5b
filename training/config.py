"""What a training recipe can say, and nothing else: unknown keys are refused by jsonargparse.

A recipe names one family by filling in its section (`mmgem:`, `clip:` or `flava:`). The
ZeRO stage lives in a plain DeepSpeed file (`deepspeed: ds_configs/zero3.json`);
we fill in only what follows from the recipe (batch sizes, precision, clipping).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from curation.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

LOSSES = {"mmgem": ("generate",), "clip": (), "flava": ("itm", "mim", "mlm", "mmm_image", "mmm_text")}
"""The families, by the name of their section, and the losses of each beside the coupled one."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT: an open_clip architecture by name (with weights), or sizes for one from scratch.

    patch_dropout: share of patches left out while training (FLIP, arXiv 2212.00794).
    """

    arch: str | None = None
    pretrained: str | None = None
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A causal LM: any `AutoModelForCausalLM` by name or path, or the sizes of a Llama from scratch."""

    name_or_path: str | None = None
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer by name or folder, or a byte-level BPE of `vocab_size` trained on the captions of the data."""

    name_or_path: str | None = None
    vocab_size: int = 4096


@dataclass(frozen=True, kw_only=True)
class MMGemRecipe:
    """MM-GEM stage 1 (arXiv 2405.19333): ViT and one causal LLM that embeds and captions."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embed_dim: int = 512


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """An open_clip dual encoder: an architecture by name (with weights), or its `model_cfg` (embed_dim,
    vision_cfg, text_cfg as in open_clip's JSON files)."""

    arch: str | None = None
    pretrained: str | None = None
    model_cfg: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """What FLAVA's masked patches are predicted as: a frozen image tokenizer by name or folder, or k-means codes of
    patches, trained on the pictures of the data. `vocab_size` is how many codes it has."""

    name_or_path: str | None = None
    vocab_size: int = 512


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden (training/masks.py). patches: hidden in each picture, in blocks of at least `min_block` ·
    tokens: share of tokens (or of words) · mismatched: share of pairs that get another's text, for matching."""

    patches: int = 75
    min_block: int = 16
    min_aspect: float = 0.3
    tokens: float = 0.15
    whole_words: bool = False
    mismatched: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FlavaRecipe:
    """FLAVA (arXiv 2112.04482): image, text and multimodal encoders of one width, five losses.

    name_or_path: a transformers FLAVA checkpoint to start from; the sizes must be its own.
    """

    name_or_path: str | None = None
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_layers: int = 12
    text_layers: int = 12
    multimodal_layers: int = 6
    max_position_embeddings: int = 512
    embed_dim: int = 768
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss weights (1 where not named) and temperature. `reduction` sums (MM-GEM) or averages (CLIP) directions."""

    coupled: Literal["infonce"] = "infonce"
    reduction: Literal["sum", "mean"] = "sum"
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.07
    temperature_floor: float = 0.01


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of the parameters whose names match `pattern` (re.search); the first match wins."""

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. Biases, norms and the temperature are never decayed."""

    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    gradient_clipping: float = 1.0
    groups: list[GroupConfig] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a batch is made of.

    batch: samples of a global batch · chunk: samples that a rank runs at a time · retain: samples whose activations
    a rank keeps instead of computing them again; as many as memory has room for, since the step costs less ·
    captions: the caption that curation scored, or at each visit one of the json's `captions`, or one of several text
    members by weight, `{txt: 0.5, recaption.txt: 0.5}` (txt is the scored caption; what a sample lacks is not drawn) ·
    resize_mode: "squash" keeps the whole picture, "shortest" its centre square ·
    decode_size: side that decoded pictures are cached at (crops are cut from it; null = the model's) ·
    crop_scale: area of the random crop · cache_decoded: keep decoded pictures in RUN/decoded.u8.
    """

    batch: int = 256
    chunk: int = 64
    retain: int = 0
    captions: Literal["caption", "random"] | dict[str, float] = "caption"
    max_tokens: int = 48
    resize_mode: Literal["squash", "shortest"] = "squash"
    decode_size: int | None = None
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    window_shards: int = 8
    threads: int = 1
    cache_decoded: bool = False
    max_error_rate: float = 0.01


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. `samples` is what the run sees in all, repeats included."""

    samples: int = 1_000_000
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    deepspeed: str = "ds_configs/zero3.json"
    checkpoint_every: int = 500
    keep_last: int = 3
    log_every: int = 10
    mmgem: MMGemRecipe | None = None
    clip: ClipRecipe | None = None
    flava: FlavaRecipe | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in LOSSES) != 1:
            raise UserError(f"recipe: exactly one family section is needed; fill in one of {', '.join(LOSSES)}")
        positive = {
            "loader.batch": self.loader.batch,
            "loader.chunk": self.loader.chunk,
            "loader.threads": self.loader.threads,
            "loader.window_shards": self.loader.window_shards,
            "checkpoint_every": self.checkpoint_every,
            "keep_last": self.keep_last,
            "log_every": self.log_every,
            "objective.temperature": self.objective.temperature,
            "objective.temperature_floor": self.objective.temperature_floor,
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name}: {value} is not above 0; give a positive value")
        if isinstance(self.loader.captions, dict) and not all(w > 0 for w in self.loader.captions.values() or [0]):
            raise UserError(f"loader.captions: {self.loader.captions} needs members with weights above 0")
        known = LOSSES[self.family]
        if unknown := sorted(set(self.objective.weights) - set(known)):
            raise UserError(f"objective.weights: the family has no loss {unknown[0]!r}; it has {list(known) or 'none'}")
        if self.flava is not None:
            self._check_flava(self.flava)
        if self.samples < self.loader.batch:
            raise UserError(f"samples: {self.samples} is less than one batch of {self.loader.batch}; raise it")

    def _check_flava(self, flava: FlavaRecipe) -> None:
        from training.masks import check_masks

        if flava.image_size % flava.patch_size:
            raise UserError(f"flava.patch_size: {flava.patch_size} does not divide image_size {flava.image_size}")
        if flava.hidden_size % flava.num_attention_heads:
            heads = flava.num_attention_heads
            raise UserError(f"flava.num_attention_heads: {heads} does not divide hidden_size {flava.hidden_size}")
        if self.loader.max_tokens > flava.max_position_embeddings:
            raise UserError(
                f"loader.max_tokens: {self.loader.max_tokens} is more than "
                f"flava.max_position_embeddings {flava.max_position_embeddings}; lower it"
            )
        check_masks(flava.masks, flava.image_size // flava.patch_size)

    @property
    def family(self) -> str:
        return next(name for name in LOSSES if getattr(self, name) is not None)

    @property
    def steps(self) -> int:
        return self.samples // self.loader.batch


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The recipe's DeepSpeed file with what follows from the recipe filled in.

    Raises:
        UserError: no such file, no JSON, or a value that the recipe decides.
    """
    path = Path(config.deepspeed)
    path = path if path.exists() else ROOT / config.deepspeed
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"deepspeed: {config.deepspeed} does not exist; ds_configs/ has zero1, zero2 and zero3"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed: {path} is not JSON ({error}); mend it") from None
    if config.loader.batch % world_size:
        raise UserError(f"loader.batch: {config.loader.batch} does not divide over {world_size} ranks; take a multiple")
    ours = {
        "train_micro_batch_size_per_gpu": config.loader.batch // world_size,
        "gradient_accumulation_steps": 1,
        # backward() only accumulates and step() is the boundary: what a step of several chunks needs at any stage.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    clash = sorted(set(ours) & set(settings))
    if clash:
        raise UserError(f"deepspeed: {path} sets {', '.join(clash)}, which the recipe decides; remove them there")
    automatic = [key for key, value in settings.items() if value == "auto"]
    if automatic:
        raise UserError(f'deepspeed: {path} leaves {", ".join(automatic)} at "auto", which is dropped; write the value')
    return settings | ours


def make_parser() -> Any:
    """The parser of `training/train.py` and `gemsmith train`: a recipe file and dotted overrides."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Train a recipe under DeepSpeed.", exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe (YAML)")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    parser.add_argument("--data", type=str, required=True, help="folder of webdataset shards")
    parser.add_argument("--out", type=str, required=True, help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="discard what the folder holds")
    return parser
