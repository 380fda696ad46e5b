"""What a training recipe can say, and nothing else: unknown keys are refused by jsonargparse.

A recipe names one family by filling in its section (training/family_config.py). The
ZeRO stage lives in a plain DeepSpeed file (`deepspeed: ds_configs/zero3.json`),
which training/deepspeed_config.py checks and completes.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from curation.errors import UserError
from training.family_config import KINDS, LOSSES, ClipRecipe, FlavaRecipe, MMGemRecipe, Vlm2VecRecipe

ROOT = Path(__file__).resolve().parent.parent


def _check_pattern(field: str, pattern: str) -> None:
    """Raises UserError where it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression ({error}); mend it") from None


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
        _check_pattern("adapter.target_modules", self.target_modules)
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout: {self.dropout} is not in [0, 1); 0 drops nothing")
        if self.modules_to_save and self.kind == "prompt":
            raise UserError("adapter.modules_to_save: with a prompt nothing else of the module trains; leave it out")
        if self.merge and self.kind in ("prompt", "qlora"):
            raise UserError(f"adapter.merge: {self.kind} cannot be merged into the weights exactly; set it to false")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The coupled loss, the weights of the separable ones (1 where not named) and the temperature.

    directions, reduction: of InfoNCE; `reduction` sums (MM-GEM) or averages (CLIP) its two directions ·
    duplicates: pairs of rows that show the same thing are negatives, masked (neither), or positives ·
    gather: every rank holds all right sides of the batch, or they go round in a ring, where they would not fit ·
    tile: rows and columns of the logits that exist at once ·
    temperature: where it begins (null = where a pretrained model's ended, else 0.07, SigLIP's 0.1) ·
    temperature_schedule: learned between floor and ceiling, or from `temperature` to `temperature_end` over the run ·
    logit_bias: where SigLIP's learned bias begins (null = where a pretrained one's ended, else as its architecture
    says, else -10).
    """

    coupled: Literal["infonce", "siglip"] = "infonce"
    directions: Literal["both", "left_to_right"] = "both"
    reduction: Literal["sum", "mean"] = "sum"
    duplicates: Literal["negative", "masked", "positive"] = "negative"
    gather: Literal["all", "ring"] = "all"
    tile: int = 512
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    temperature_schedule: Literal["learned", "constant", "linear", "cosine"] = "learned"
    temperature_end: float | None = None
    temperature_floor: float = 0.01
    temperature_ceiling: float = 1.0
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise UserError(f"objective.tile: {self.tile} is not above 0; give a positive value")
        for name in ("temperature", "temperature_end", "temperature_floor", "temperature_ceiling"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"objective.{name}: {value} is not above 0; give a positive value")
        moves = self.temperature_schedule in ("linear", "cosine")
        if moves and self.temperature_end is None:
            raise UserError(f"objective.temperature_end: {self.temperature_schedule} needs it; give the last one")
        if not moves and self.temperature_end is not None:
            raise UserError(
                f"objective.temperature_end: temperature_schedule {self.temperature_schedule} has none; "
                "take linear or cosine, or remove it"
            )
        if self.coupled == "siglip" and self.directions != "both":
            raise UserError("objective.directions: siglip has pairs and no directions; remove it")
        if self.temperature_floor > self.temperature_ceiling:
            raise UserError(
                f"objective.temperature_floor: {self.temperature_floor} is above "
                f"temperature_ceiling {self.temperature_ceiling}; lower it"
            )


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of the parameters whose names match `pattern` (re.search); no other group's pattern may match them.

    weight_decay: of the matrices among them.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        _check_pattern("optim.groups", self.pattern)
        if self.frozen and (self.lr, self.weight_decay) != (None, None):
            raise UserError(
                f"optim.groups: {self.pattern!r} is frozen and has a rate or decay; remove one or the other"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, or LAMB (its trust ratio over whole parameters). Biases, norms and the temperature are never decayed.

    max_skipped: steps in a row that may be left out, for a loss or gradient that is not finite, before the run ends ·
    max_loss_ratio: leave out a step whose loss is above so many times the median of the last hundred, or never. For
    losses that stay far above 0, as captioning's do: a contrastive one near 0 has ordinary batches of many medians.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    gradient_clipping: float = 1.0
    max_skipped: int = 10
    max_loss_ratio: float | None = None
    groups: list[GroupConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps", "gradient_clipping", "max_skipped"):
            if not (value := getattr(self, name)) >= 0:  # NaN too
                raise UserError(f"optim.{name}: {value} is below 0; give 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas: {list(self.betas)} are not in [0, 1); [0.9, 0.98] are usual")
        if not self.eps > 0:  # a gradient of 0, as of a word that no text has, would be 0 / 0
            raise UserError(f"optim.eps: {self.eps} is not above 0; 1e-6 is usual")


Kind = Literal["pairs", "images", "texts", "rows", "regions"]
"""What a sample is to a step: a picture and a caption, one of them alone, what a family reads of its own source, or one
of the picture's regions and its phrase, another in each epoch."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources: its shards (a folder or URL; `--data NAME=DIR` says it too), its weight in the mixture,
    and what its chunks hold. Of kind rows: a subset's folder of MMEB-train, or one parquet file of it ·
    limit: rows that are read of it, from the first on (null = all).
    """

    path: str = ""
    weight: float = 1.0
    kind: Kind = "pairs"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a batch is made of.

    batch: samples of a global batch · chunk: samples that a rank runs at a time · retain: samples whose activations
    a rank keeps instead of computing them again (null = a chunk of them, which takes no more than a step does anyway),
    or "auto": as many as `retain_gib` of memory has room for (null: what a GPU has free), measured at the beginning ·
    captions: the caption that curation scored, or at each visit one of the json's `captions`, or one of several text
    members by weight, `{txt: 0.5, recaption.txt: 0.5}` (txt is the scored caption; what a sample lacks is not drawn) ·
    resize_mode: "squash" keeps the whole picture, "shortest" its centre square (null = as the pretrained vision tower
    saw pictures, squash where there is none); not of vlm2vec, which sees whole pictures with their aspect ·
    decode_size: side that decoded pictures are cached at (crops are cut from it; null = the model's); of vlm2vec the
    longest side of a picture, in training and afterwards (null = its own, which the backbone's processor bounds) ·
    crop_scale: area of the random crop · color_jitter (brightness, contrast, saturation, hue), color_jitter_prob,
    gray_scale_prob: as open_clip names them · cache_decoded: keep decoded pictures in RUN/decoded.*.u8 ·
    neighbours: after every sample one of its nearest pictures, with its own caption (NegCLIP; `gemsmith neighbours`) ·
    sources: by name, where there are several · unit: samples in a row that one source gives · mixing: which source a
    unit takes, by exact shares of the weights in every block, at random by weight, or in turn ·
    window_shards: shards that samples are mixed over · prefetch: batches made ahead ·
    cache_dir, cache_gib: where remote shards are kept (null = gemsmith-shards in the temporary folder), and how much
    · max_error_rate: share of samples that may be unreadable (above 0: or one), in any stretch of `error_window`.
    """

    batch: int = 256
    chunk: int = 64
    retain: int | Literal["auto"] | None = None
    retain_gib: float | None = None
    captions: Literal["caption", "random"] | dict[str, float] = "caption"
    max_tokens: int = 48
    resize_mode: Literal["squash", "shortest"] | None = None
    decode_size: int | None = None
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    color_jitter_prob: float = 0.0
    gray_scale_prob: float = 0.0
    neighbours: bool = False
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    unit: int = 1
    mixing: Literal["shares", "random", "round_robin"] = "shares"
    window_shards: int = 8
    threads: int = 1
    prefetch: int = 2
    cache_decoded: bool = False
    cache_dir: str | None = None
    cache_gib: float = 64.0
    max_error_rate: float = 0.01
    error_window: int = 100_000

    def check(self) -> None:
        """
        Raises:
            UserError: values that no batch can be made of.
        """
        positive = ("batch", "chunk", "threads", "window_shards", "unit", "cache_gib", "error_window")
        for name in (*positive, "retain_gib", "decode_size"):
            if (value := getattr(self, name)) is not None and not value > 0:  # NaN too
                raise UserError(f"loader.{name}: {value} is not above 0; give a positive value")
        for name in ("max_error_rate", "color_jitter_prob", "gray_scale_prob"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"loader.{name}: {value} is not in [0, 1]; give a share")
        if self.prefetch < 0:
            raise UserError(f"loader.prefetch: {self.prefetch} is below 0; 2 batches ahead are plenty")
        if isinstance(self.retain, int) and self.retain < 0:
            raise UserError(f"loader.retain: {self.retain} is below 0; 0 retains nothing, auto as much as fits")
        if self.max_tokens < 3:  # [CLS] and [SEP], or [EMB], are among them
            raise UserError(f"loader.max_tokens: {self.max_tokens} leaves no room for a text; give 3 or more")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"loader.crop_scale: {list(self.crop_scale)} are no shares of an area; [0.9, 1] are usual")
        if not (all(change >= 0 for change in self.color_jitter) and self.color_jitter[3] <= 0.5):
            raise UserError(f"loader.color_jitter: {list(self.color_jitter)} are not 0 or more, the hue's at most 0.5")
        if isinstance(self.captions, dict) and not all(w > 0 for w in self.captions.values() or [0]):
            raise UserError(f"loader.captions: {self.captions} needs members with weights above 0")
        if isinstance(self.captions, dict) and (named := {"json", "uid"} & self.captions.keys()):
            raise UserError(f"loader.captions: {min(named)!r} is no text; name txt, or write random for the json's")
        for name, source in self.sources.items():
            if not name.isidentifier():
                raise UserError(f"loader.sources: {name!r} is no name; take letters, digits and _")
            if source.weight <= 0:
                raise UserError(f"loader.sources.{name}.weight: {source.weight:g} is not above 0; leave the source out")
            if source.limit is not None and (source.limit < 1 or source.kind != "rows"):
                raise UserError(f"loader.sources.{name}.limit: is a number of rows above 0, of kind rows; remove it")
        if self.neighbours:
            if self.batch % 2 or (len(self.sources) > 1 and self.unit % 2):
                raise UserError(
                    "loader.neighbours: go by twos; take an even batch, and an even unit of several sources"
                )
            if any(source.kind != "pairs" for source in self.sources.values()):
                raise UserError("loader.neighbours: are of pairs; remove it, or the sources of other kinds")
        if self.batch % self.unit:
            raise UserError(
                f"loader.unit: {self.unit} does not divide the batch of {self.batch}; take a divisor, or the batch"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run says of itself, beside metrics.jsonl and TensorBoard. Not part of what the run computes.

    wandb: project of Weights & Biases, or none · hang_seconds: a run in which no step has ended for so long says where
    it hangs and ends; above the slowest checkpoint · max_data_share: share of the time spent waiting for data above
    which a warning names the cause · profile_steps: [first, last] step that torch's profiler records on rank 0.
    """

    wandb: str | None = None
    hang_seconds: float = 600.0
    max_data_share: float = 0.1
    profile_steps: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. `samples` is what the run sees in all, repeats included.

    activation_checkpointing: compute the activations of a block again in its backward pass · background_save: copy what
    a checkpoint holds and write it beside the training · reduce_gradients (ZeRO-2 and 3): sum the chunks' gradients on
    each rank, 4 bytes for each trained parameter, and reduce them once a step; or reduce every chunk's as they come,
    which needs no such memory and n times the traffic for n chunks.
    """

    samples: int = 1_000_000
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    deepspeed: str = "ds_configs/zero3.json"
    checkpoint_every: int = 500
    keep_last: int = 3
    background_save: bool = False
    activation_checkpointing: bool = False
    reduce_gradients: Literal["step", "chunk"] = "step"
    log_every: int = 10
    log: LogConfig = field(default_factory=LogConfig)
    mmgem: MMGemRecipe | None = None
    clip: ClipRecipe | None = None
    flava: FlavaRecipe | None = None
    vlm2vec: Vlm2VecRecipe | None = None
    adapter: AdapterConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in LOSSES) != 1:
            raise UserError(f"recipe: exactly one family section is needed; fill in one of {', '.join(LOSSES)}")
        positive = {
            "checkpoint_every": self.checkpoint_every,
            "keep_last": self.keep_last,
            "log_every": self.log_every,
            "log.hang_seconds": self.log.hang_seconds,
            "log.max_data_share": self.log.max_data_share,
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name}: {value} is not above 0; give a positive value")
        self.loader.check()
        self._check_kinds()
        if self.log.profile_steps is not None and not 1 <= self.log.profile_steps[0] <= self.log.profile_steps[1]:
            raise UserError(f"log.profile_steps: {list(self.log.profile_steps)} are not [first, last], counted from 1")
        if self.optim.max_loss_ratio is not None and self.optim.max_loss_ratio <= 1:
            raise UserError(f"optim.max_loss_ratio: {self.optim.max_loss_ratio} would skip usual steps; take 2 or more")
        known = ["embed", *LOSSES[self.family]]
        if unknown := sorted(set(self.objective.weights) - set(known)):
            raise UserError(f"objective.weights: the family has no loss {unknown[0]!r}; it has {', '.join(known)}")
        if self.flava is not None:
            self.flava.check()
            if self.loader.max_tokens > self.flava.max_position_embeddings:
                raise UserError(
                    f"loader.max_tokens: {self.loader.max_tokens} is more than "
                    f"flava.max_position_embeddings {self.flava.max_position_embeddings}; lower it"
                )
        if self.samples < self.loader.batch:
            raise UserError(f"samples: {self.samples} is less than one batch of {self.loader.batch}; raise it")

    def _check_kinds(self) -> None:
        known = KINDS[self.family]
        for name, source in self.loader.sources.items():
            if source.kind not in known:
                raise UserError(
                    f"loader.sources.{name}.kind: {self.family} trains on {' and '.join(known)}, not {source.kind}"
                )
        if any(source.kind == "regions" for source in self.loader.sources.values()) and self.loader.crop_scale[0] < 1:
            raise UserError("loader.crop_scale: a crop may cut a region off; with kind regions leave it at [1, 1]")
        if self.mmgem is not None:
            self.mmgem.check_stage(self.loader.sources, self.adapter)
        if self.vlm2vec is not None:
            self.vlm2vec.check_loader(self.loader)

    @property
    def family(self) -> str:
        return next(name for name in LOSSES if getattr(self, name) is not None)

    @property
    def steps(self) -> int:
        return self.samples // self.loader.batch


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def make_parser() -> Any:
    """The parser of `training/train.py` and `gemsmith train`: a recipe file and dotted overrides."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Train a recipe under DeepSpeed.", exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe (YAML)")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    parser.add_argument(
        "--data",
        action="append",
        type=str,
        default=[],
        metavar="[NAME=]DIR",
        help="folder or URL of webdataset shards; NAME=DIR for each of several sources",
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="discard what the folder holds")
    return parser
