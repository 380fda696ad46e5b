"""What the families' sections of a recipe can say: `mmgem:`, `clip:`, `flava:` or `vlm2vec:`.

A new family is a section here, a line in `LOSSES` and in `KINDS`, and a field of `TrainConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from curation.errors import UserError

LOSSES = {
    "mmgem": ("generate",),
    "clip": ("generate",),  # CoCa's
    "flava": ("itm", "mim", "mlm", "mmm_image", "mmm_text"),
    "vlm2vec": (),
}
"""The families, by the name of their section, and the losses of each beside the coupled one."""

KINDS = {
    "mmgem": ("pairs", "regions"),
    "clip": ("pairs",),
    "flava": ("pairs", "images", "texts"),
    "vlm2vec": ("pairs", "rows"),
}
"""What a source of each may hold."""


def check_patch_dropout(field: str, share: float | None) -> None:
    """
    Raises:
        UserError: no share of patches that may be left out.
    """
    if share is not None and not 0 <= share < 1:
        raise UserError(f"{field}: {share} is no share of patches; give 0 to below 1")


def check_divides(field: str, part: int, whole: str, size: int) -> None:
    """
    Args:
        whole, size: the name and the value of what `part` should divide.

    Raises:
        UserError: it does not.
    """
    if part < 1 or size < 1 or size % part:
        raise UserError(f"{field}: {part} does not divide {whole} {size}; take one that does")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT: an open_clip architecture by name (with weights), or sizes for one from scratch.

    arch: also local-dir:FOLDER, the export of a CLIP, whose sizes are then the tower's ·
    quick_gelu: of sizes from scratch: whether its activation is the one of OpenAI's CLIPs ·
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
    quick_gelu: bool = False
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_patch_dropout("mmgem.vision.patch_dropout", self.patch_dropout)
        if self.arch is not None:
            return
        for name in ("patch_size", "layers"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"mmgem.vision.{name}: {value} is not above 0; give a positive value")
        if self.patch_size > self.image_size:
            raise UserError(f"mmgem.vision.patch_size: {self.patch_size} is above image_size {self.image_size}")
        check_divides("mmgem.vision.head_width", self.head_width, "width", self.width)


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

    def __post_init__(self) -> None:
        if self.name_or_path is not None:
            return
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check_divides("mmgem.language.num_attention_heads", heads, "hidden_size", self.hidden_size)
        check_divides("mmgem.language.num_key_value_heads", groups, "num_attention_heads", heads)
        if (width := self.hidden_size // heads) % 2:  # rotary positions turn twos
            raise UserError(f"mmgem.language.num_attention_heads: {heads} are {width} wide, which is odd; take fewer")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer by name or folder, or a byte-level BPE of `vocab_size` trained on the captions of the data."""

    name_or_path: str | None = None
    vocab_size: int = 4096


@dataclass(frozen=True, kw_only=True)
class MappingConfig:
    """What turns the patches of a frozen ViT into visual tokens of a frozen LLM (training/models/bridge.py).

    kind: linear, a token a patch (LiMBeR, arXiv 2209.15162), or a transformer (MAPL, arXiv 2210.07179) that gives
    `tokens`, of `layers` of `width` with `heads`.
    """

    kind: Literal["linear", "transformer"] = "linear"
    tokens: int = 32
    width: int = 256
    layers: int = 4
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "layers", "heads"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"mmgem.mapping.{name}: {value} is not above 0; give a positive value")
        check_divides("mmgem.mapping.heads", self.heads, "width", self.width)


@dataclass(frozen=True, kw_only=True)
class MMGemRecipe:
    """MM-GEM (arXiv 2405.19333): ViT and one causal LLM that embeds and captions.

    mapping: instead, captions alone through a mapping between the two, which the recipe freezes (LiMBeR, MAPL) ·
    negatives, tagger: hard negative captions, as a `clip:` section has them ·
    init: RUN/export or RUN/checkpoints/step_* to begin from, whose vision, language, tokenizer and embed_dim it takes ·
    stage2: what trains on regions, all else frozen: captioning (h3 and the prompts) or retrieval (h4) ·
    prompts: soft prompts in place of [CAP]; 0: none yet · h4: whether there is a layer for regions after h1 ·
    tokenizer: where it names none, that of the LLM in `language.name_or_path`; trained where that is from scratch ·
    embed_tokens: what a text is cut to when it is embedded outside training; null: loader.max_tokens.
    """

    init: str | None = None
    stage2: Literal["captioning", "retrieval"] | None = None
    prompts: int = 0
    h4: bool = False
    embed_tokens: int | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embed_dim: int = 512
    mapping: MappingConfig | None = None
    negatives: int = 0
    tagger: str = "builtin"

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise UserError(f"mmgem.negatives: {self.negatives} is below 0; 0 takes none")
        if self.negatives and self.mapping is not None:
            raise UserError("mmgem.negatives: a mapping has no contrastive loss for them; remove one of the two")
        if self.stage2 is not None and (self.negatives or self.mapping is not None):
            raise UserError(f"mmgem.stage2: {self.stage2} trains on regions alone; remove negatives and mapping")
        if self.mapping is not None and (self.init is not None or self.prompts or self.h4):
            raise UserError(
                "mmgem.mapping: takes no run to begin from and no part of stage 2; remove init, prompts, h4"
            )

    def check_stage(self, sources: Mapping[str, Any], adapter: Any) -> None:
        """
        Raises:
            UserError: data or an adapter that the stage cannot train with; numbers that cannot be.
        """
        wanted = "pairs" if self.stage2 is None else "regions"
        kinds = {name: source.kind for name, source in sources.items()} or {"data": "pairs"}
        if wrong := next((name for name, kind in kinds.items() if kind != wanted), None):
            stage = "stage 1" if self.stage2 is None else f"stage2: {self.stage2}"
            raise UserError(f"loader.sources.{wrong}.kind: mmgem in {stage} trains on {wanted}, not {kinds[wrong]}")
        if self.init is not None and adapter is not None:
            raise UserError("adapter: a run from mmgem.init trains weights of its own; remove one of the two")
        dropout = adapter is not None and adapter.dropout and self.mapping is None
        if dropout and adapter.module.split(".")[0] not in ("vision", "llm"):
            raise UserError(
                f"adapter.dropout: with module {adapter.module!r} its masks could not be drawn alike in both passes of "
                "a step; adapt llm or vision, or set it to 0"
            )
        if self.prompts < 0:
            raise UserError(f"mmgem.prompts: {self.prompts} is below 0; the paper takes 64")
        if self.embed_tokens is not None and self.embed_tokens < 2:
            raise UserError(f"mmgem.embed_tokens: {self.embed_tokens} leaves no room for a text; give 2 or more")


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """An open_clip dual encoder: an architecture by name (with weights), or its `model_cfg` (embed_dim,
    vision_cfg, text_cfg as in open_clip's JSON files); with a multimodal_cfg it is a CoCa.

    arch: also local-dir:FOLDER, an export · pretrained: a tag of open_clip's, or a file of weights ·
    patch_dropout: share of patches left out while training (FLIP, arXiv 2212.00794), null = the `model_cfg`'s, else 0 ·
    negatives: hard negative captions of each row, words swapped (NegCLIP, arXiv 2210.01936) · tagger: what tells parts
    of speech for them: builtin, or a spaCy pipeline by name or path.
    """

    arch: str | None = None
    pretrained: str | None = None
    model_cfg: dict[str, Any] | None = None
    patch_dropout: float | None = None
    negatives: int = 0
    tagger: str = "builtin"

    def __post_init__(self) -> None:
        check_patch_dropout("clip.patch_dropout", self.patch_dropout)
        if self.negatives < 0:
            raise UserError(f"clip.negatives: {self.negatives} is below 0; 0 takes none")
        if self.model_cfg is not None:
            self._check_model_cfg(self.model_cfg)

    @staticmethod
    def _check_model_cfg(model_cfg: dict[str, Any]) -> None:
        """
        Raises:
            UserError: a section that lacks, or heads that do not divide a transformer's width. (open_clip itself checks
                the rest where it is built, in training/models/clip.py.)
        """
        for name in ("vision_cfg", "text_cfg"):
            if not isinstance(model_cfg.get(name), dict):
                raise UserError(f"clip.model_cfg.{name}: is needed; write it as open_clip's files have it")
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        if not vision.get("timm_model_name") and isinstance(vision.get("layers", 12), int):
            width, head = vision.get("width", 768), vision.get("head_width", 64)
            check_divides("clip.model_cfg.vision_cfg.head_width", head, "width", width)
        if not text.get("hf_model_name"):
            check_divides("clip.model_cfg.text_cfg.heads", text.get("heads", 8), "width", text.get("width", 512))


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """What FLAVA's masked patches are predicted as: a frozen image tokenizer by name or folder, or k-means codes of
    patches, trained on the pictures of the data. `vocab_size` is how many codes it has."""

    name_or_path: str | None = None
    vocab_size: int = 512


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden (training/masks.py). patches: hidden in each picture, in blocks of at least `min_block` ·
    tokens: share of tokens, or of words in the streams that `whole_words` names · mismatched: share of pairs that get
    another's text, for matching."""

    patches: int = 75
    min_block: int = 16
    min_aspect: float = 0.3
    tokens: float = 0.15
    whole_words: tuple[Literal["pairs", "texts"], ...] = ()
    mismatched: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FlavaRecipe:
    """FLAVA (arXiv 2112.04482): image, text and multimodal encoders of one width, five losses.

    name_or_path: a transformers FLAVA checkpoint to start from; the sizes must be its own ·
    patch_dropout: share of patches left out while training (FLIP, arXiv 2212.00794), clean or masked; hidden patches
    among them are not asked for.
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
    patch_dropout: float = 0.0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)

    def check(self) -> None:
        """
        Raises:
            UserError: sizes that do not divide, masks that cannot be.
        """
        from training.masks import check_masks

        check_divides("flava.patch_size", self.patch_size, "image_size", self.image_size)
        check_divides("flava.num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        check_patch_dropout("flava.patch_dropout", self.patch_dropout)
        check_masks(self.masks, self.image_size // self.patch_size)


@dataclass(frozen=True, kw_only=True)
class Vlm2VecRecipe:
    """VLM2Vec (arXiv 2410.05160): a vision-language model as an embedder.

    name_or_path: any `AutoModelForImageTextToText` · backbone: or the config (`model_type` and sizes) of one from
    scratch, with a tokenizer trained on the data · processor: where its processor is, if not with the backbone ·
    processor_settings: passed to `AutoProcessor.from_pretrained` ({max_pixels: 1003520}, ...), which must take them ·
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
    negatives: int = 0
    instruction: str = "Find an image caption describing the given everyday image."

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.backbone is None):
            raise UserError("vlm2vec: exactly one of `name_or_path` and `backbone` (a config from scratch) is needed")
        if self.processor_settings and self.name_or_path is None and self.processor is None:
            raise UserError("vlm2vec.processor_settings: a backbone from scratch has none to change; leave them out")
        if self.negatives < 0:
            raise UserError(f"vlm2vec.negatives: {self.negatives} is below 0; 0 takes none")
        if self.embed_dim is not None and self.embed_dim < 1:
            raise UserError(f"vlm2vec.embed_dim: {self.embed_dim} is below 1; null takes the backbone's width")

    def check_loader(self, loader: Any) -> None:
        """
        Raises:
            UserError: a loader that this family's pictures, which are of any shape, cannot come from.
        """
        if loader.retain == "auto":
            raise UserError("loader.retain: auto measures pictures of one size; vlm2vec needs a number")
        if loader.resize_mode is not None:
            raise UserError(
                f"loader.resize_mode: {loader.resize_mode}: a VLM sees whole pictures with their aspect; leave it out"
            )
        if loader.cache_decoded and loader.decode_size is None:
            raise UserError("loader.cache_decoded: vlm2vec's pictures have no largest size; give loader.decode_size")
