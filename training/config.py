"""What a training recipe can say, and nothing else: unknown keys are refused by jsonargparse.

A recipe names one family by filling in its section (`mmgem:`, `clip:` or `vlm2vec:`). The
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
FAMILY_SECTIONS = ("mmgem", "clip", "vlm2vec")


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
class Vlm2VecRecipe:
    """VLM2Vec (arXiv 2410.05160): a vision-language model as an embedder.

    name_or_path: any `AutoModelForImageTextToText` · backbone: or the config (`model_type` and sizes) of one from
    scratch, with a tokenizer trained on the data · processor: where its processor is, if not with the backbone ·
    processor_settings: passed to `AutoProcessor.from_pretrained` ({max_pixels: 1003520}, ...) ·
    trust_remote_code: run the code that the model's repository brings · embed_dim: width of a projection, null = none ·
    negatives: hard negatives that a row has room for · instruction: of picture-caption pairs.
    """

    name_or_path: str | None = None
    backbone: dict[str, Any] | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    processor: str | None = None
    processor_settings: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    padding_side: Literal["left", "right"] = "left"
    embed_dim: int | None = None
    normalize: bool = True
    learn_temperature: bool = False
    negatives: int = 0
    instruction: str = "Find an image caption describing the given everyday image."

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.backbone is None):
            raise UserError("vlm2vec: exactly one of `name_or_path` and `backbone` (a config from scratch) is needed")
        if self.negatives < 0:
            raise UserError(f"vlm2vec.negatives: {self.negatives} is below 0; 0 takes none")
        if self.embed_dim is not None and self.embed_dim < 1:
            raise UserError(f"vlm2vec.embed_dim: {self.embed_dim} is below 1; null takes the backbone's width")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A small part that trains in place of a frozen module, by peft.

    kind: lora (arXiv 2106.09685), dora (2402.09353), vera (2310.11454), qlora (2305.14314), prompt (2104.08691) ·
    module: the part of the model that is frozen and adapted (mmgem: llm, vlm2vec: backbone, clip: towers) ·
    target_modules: regular expression that the names of its linear layers match in full, or "all-linear" ·
    modules_to_save: parts of it that train whole · tokens: of a prompt ·
    init_from: folder of an adapter to begin with · merge: export merged weights too, which need no peft.
    """

    kind: Literal["lora", "dora", "vera", "prompt", "qlora"] = "lora"
    module: str
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    tokens: int = 16
    init_from: str | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        for name, value in {"r": self.r, "alpha": self.alpha, "tokens": self.tokens}.items():
            if value <= 0:
                raise UserError(f"adapter.{name}: {value} is not above 0; give a positive value")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout: {self.dropout} is not in [0, 1); 0 drops nothing")
        if self.modules_to_save and self.kind == "prompt":
            raise UserError("adapter.modules_to_save: with a prompt nothing else of the module trains; leave it out")
        if self.merge and self.kind in ("prompt", "qlora"):
            raise UserError(f"adapter.merge: {self.kind} cannot be merged into the weights exactly; set it to false")


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
    vlm2vec: Vlm2VecRecipe | None = None
    adapter: AdapterConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in FAMILY_SECTIONS) != 1:
            named = ", ".join(f"`{name}:`" for name in FAMILY_SECTIONS)
            raise UserError(f"recipe: exactly one family section is needed; fill in one of {named}")
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
        known = {"generate"} if self.mmgem is not None else set()
        if unknown := sorted(set(self.objective.weights) - known):
            raise UserError(
                f"objective.weights: the family has no loss {unknown[0]!r}; it has {sorted(known) or 'none'}"
            )
        if self.samples < self.loader.batch:
            raise UserError(f"samples: {self.samples} is less than one batch of {self.loader.batch}; raise it")

    @property
    def family(self) -> str:
        return next(name for name in FAMILY_SECTIONS if getattr(self, name) is not None)

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
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 and config.adapter is not None and config.adapter.kind == "qlora":
        raise UserError("adapter.kind: qlora's packed weights cannot be cut up by ZeRO-3; take ds_configs/zero2.json")
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
