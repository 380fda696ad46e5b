"""VLM2Vec (arXiv 2410.05160): any vision-language model as an embedder of texts, pictures, and both at once.

A side goes through the whole backbone; its embedding is the last layer's state
at its last real token, scaled to unit length. Instructions are part of the
query's text. The backbone is any `AutoModelForImageTextToText`; code from a
repository runs only where the user says `trust_remote_code: true`.

The head over the vocabulary takes no part in an embedding: it is never run,
and frozen unless it shares its weights with the input embeddings.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from curation.errors import UserError, one_line
from training.config import ObjectiveConfig
from training.family_config import Vlm2VecRecipe
from training.models.kind import check_kind, opened_model, whole
from training.models.scalars import add_scalars, read_scalars
from training.models.vlm_inputs import of_side
from training.models.vlm_processor import build_processor, build_tokenizer, check_settings

HEAD = r"(^|\.)lm_head\."
"""What a backbone may lack: an embedder is often published without it."""


class Vlm2VecConfig(PretrainedConfig):
    """backbone: the VLM's own config, as a dict · backbone_name: where its code is, for one with remote code ·
    embed_dim: width of a projection, None for the backbone's own states · objective: the coupled loss's section of the
    recipe (which scalars there are, and where they begin).

    trust_remote_code: whether the backbone's own code may run. It is never written down and never read from a folder,
    whatever its config.json says: who opens the folder says so again.
    """

    model_type = "vlm2vec"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        backbone_name: str | None = None,
        embed_dim: int | None = None,
        normalize: bool = True,
        objective: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone, self.backbone_name = backbone or {}, backbone_name
        self.embed_dim, self.normalize = embed_dim, normalize
        self.objective = objective or {}
        super().__init__(**kwargs)
        self.trust_remote_code = False  # last, whatever else the folder's config sets

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "trust_remote_code"}

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own config: its backbone is configured by the dict."""
        return self


class Vlm2Vec(PreTrainedModel):
    """Embeds any mix of texts and pictures in one space."""

    config_class = Vlm2VecConfig
    base_model_prefix = "vlm2vec"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    separable = ()

    def __init__(self, config: Vlm2VecConfig, backbone: Any = None) -> None:
        """backbone: a model that is loaded already; otherwise one is built from the config."""
        super().__init__(config)
        settings = backbone_config(config) if backbone is None else backbone.config
        if backbone is None:
            trust = config.trust_remote_code
            kind, dtype = _loader(settings, trust), torch.get_default_dtype()  # not the one it was published in
            backbone = kind.from_config(settings, trust_remote_code=trust, dtype=dtype)
        else:
            for module in backbone.modules():
                module._is_hf_initialized = True  # else `post_init` would draw its weights again
        self.backbone = backbone
        # No block is gathered whole: the backbone runs twice in a forward (queries, targets), and DeepSpeed takes a
        # leaf module's parameters for unused when the first of its two backward passes is through.
        self.blocks: set[str] = set()
        width = settings.get_text_config().hidden_size
        self.projection = nn.Linear(width, config.embed_dim, bias=False) if config.embed_dim else None
        self.scalars = add_scalars(self, ObjectiveConfig(**config.objective))
        self.post_init()
        head, words = backbone.get_output_embeddings(), backbone.get_input_embeddings()
        if head is not None and head.weight is not words.weight:
            head.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone has initialised itself; only the projection is ours."""
        if module is self.projection:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "Vlm2Vec":
        """`trust_remote_code`: whether the backbone's code may run, where it brings some.

        Raises:
            UserError: the folder holds another family's model or lacks weights, or its backbone brings code that is
                not trusted.
        """
        name, field = pretrained_model_name_or_path, "Vlm2Vec.from_pretrained"
        check_kind(name, Vlm2VecConfig.model_type, field)
        config = kwargs.pop("config", None)
        if not isinstance(config, Vlm2VecConfig):
            config = Vlm2VecConfig.from_pretrained(config or name)
        # transformers' own would drop it on the way.
        config.trust_remote_code = kwargs.pop("trust_remote_code", None) is True
        return whole(partial(super().from_pretrained, name, *args, config=config), name, field, **kwargs)

    @classmethod
    def from_recipe(cls, recipe: Vlm2VecRecipe, settings: Any, objective: ObjectiveConfig) -> "Vlm2Vec":
        """Around the recipe's backbone: pretrained where it names one, else from scratch.

        Args:
            settings: the backbone's config, from `recipe_config`.
        """
        name, remote = recipe.name_or_path, recipe.trust_remote_code
        config = Vlm2VecConfig(
            backbone=settings.to_dict(),
            backbone_name=name if remote else None,
            embed_dim=recipe.embed_dim,
            normalize=recipe.normalize,
            objective={k: v for k, v in vars(objective).items() if k != "weights"},
        )
        config.trust_remote_code = remote
        if name is None:
            return cls(config)
        auto = _loader(settings, remote)
        said = {"trust_remote_code": remote, "dtype": torch.float32}
        return cls(config, opened_model(auto, name, "vlm2vec.name_or_path", HEAD, **said))

    def checkpoint_activations(self) -> None:
        """Keep the blocks' inputs alone, and compute the rest again in the backward pass.

        Raises:
            UserError: the backbone's code cannot.
        """
        try:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"activation_checkpointing: {one_line(error, 200)}; set it to false") from None

    def embed(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings, fp32 [n, D], of rows as `Inputs.side` makes them, padded on either side."""
        return self._encoded(inputs).pooler_output

    def _encoded(self, inputs: dict[str, torch.Tensor]) -> Any:
        """`pooler_output`: embeddings [n, D]; `last_hidden_state`: the backbone's states [n, T, H]."""
        inputs = {k: v.to(self.backbone.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        base, mask = self.backbone.base_model, inputs["attention_mask"]
        if "mm_token_type_ids" not in inputs and "position_ids" in inspect.signature(base.forward).parameters:
            # Positions count real tokens, so padding changes nothing. (With type ids, backbones count for themselves.)
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if base is self.backbone:
            hidden = base(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        else:
            hidden = base(**inputs, use_cache=False).last_hidden_state  # [n, T, H], without the head
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # [n]
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        if self.projection is not None:
            pooled = self.projection(pooled)
        pooled = F.normalize(pooled.float(), dim=-1) if self.config.normalize else pooled.float()
        return BaseModelOutputWithPooling(pooler_output=pooled, last_hidden_state=hidden)

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk of `Inputs.collate` -> the fields of `gradient_cache.Outputs`.

        left: queries [c, D] · right: targets [c, m, D], the positive first, zeros where there is none.
        """
        c, m = chunk["right_valid"].shape
        places = chunk["target.rows"]
        left = self.embed(of_side(chunk, "query"))
        targets = self.embed(of_side(chunk, "target"))
        right = targets.new_zeros(c * m, targets.shape[1]).index_copy(0, places, targets[: len(places)])
        return {"left": left[:c], "right": right.view(c, m, -1), "scalars": read_scalars(self)}

    @staticmethod
    def counts(chunk: Any) -> dict[str, float]:
        return {}

    @can_return_tuple
    def get_image_features(self, **inputs: torch.Tensor) -> BaseModelOutputWithPooling:
        """Of what the backbone's processor made of pictures with their prompts: `pooler_output`: embeddings [n, D];
        `last_hidden_state`: the backbone's states [n, T, H]."""
        return self._encoded(inputs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`, of texts."""
        return self._encoded({"input_ids": input_ids, "attention_mask": attention_mask, **inputs})

    @torch.no_grad()
    def generate(self, **inputs: Any) -> torch.Tensor:
        """New token ids [n, T] after left-padded prompts, as the backbone itself writes them (greedy unless asked)."""
        written = self.backbone.generate(**{"do_sample": False, **inputs})
        return written[:, inputs["input_ids"].shape[1] :]


def backbone_config(config: Vlm2VecConfig) -> Any:
    """The backbone's config object; one with remote code comes from where its code is."""
    if config.backbone_name is None:
        settings = dict(config.backbone)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return _config_from(config.backbone_name, config.trust_remote_code)


def recipe_config(recipe: Vlm2VecRecipe, vocabulary: Any = None) -> Any:
    """The config of the recipe's backbone.

    Args:
        vocabulary: for one from scratch: its tokenizer, whose size and special tokens fill in what the recipe leaves.

    Raises:
        UserError: no such model, an unknown kind, or remote code that the user does not allow.
    """
    if recipe.name_or_path is not None:
        settings = _config_from(recipe.name_or_path, recipe.trust_remote_code)
        _loader(settings, recipe.trust_remote_code)
        return settings
    assert recipe.backbone is not None
    given = dict(recipe.backbone)
    qwen = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    known = {
        "qwen2_vl": qwen,
        "qwen2_5_vl": qwen,
        "llava_next": {"image_token_index": "<image>"},
    }
    kind = given.pop("model_type", None)
    if kind not in known:
        raise UserError(
            f"vlm2vec.backbone.model_type: {kind!r} is not built from scratch here; take {', '.join(known)}"
        )
    text = {
        "vocab_size": len(vocabulary),
        "pad_token_id": vocabulary.pad_token_id,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        **given.pop("text_config", {}),
    }
    ids = {name: vocabulary.convert_tokens_to_ids(token) for name, token in known[kind].items()}
    return AutoConfig.for_model(kind, text_config=text, **ids, **given)


def recipe_processor(
    recipe: Vlm2VecRecipe, kept: Path | None, captions: Callable[[], Iterable[str]], known: Vlm2VecConfig | None = None
) -> tuple[Any, Any]:
    """The backbone's processor and config.

    Args:
        kept: folder that the run keeps the processor in, or None at its beginning.
        captions: texts that a tokenizer is trained on, for a backbone from scratch.
        known: the config of the whole model, where it was made before.

    Raises:
        UserError: see `recipe_config`; or no processor there, or one that does not take the recipe's settings.
    """
    where = str(kept) if kept else recipe.processor or recipe.name_or_path
    if where is None:
        assert recipe.backbone is not None
        kind = str(recipe.backbone.get("model_type"))
        tokenizer = build_tokenizer(list(captions()), recipe.tokenizer.vocab_size, kind)
        settings = recipe_config(recipe, tokenizer)
        processor = build_processor(settings, tokenizer)
    else:
        # Before the processor: a model whose code is not trusted is refused as that.
        settings = backbone_config(known) if known else recipe_config(recipe) if recipe.name_or_path else None
        try:
            asked = copy.deepcopy(recipe.processor_settings)  # transformers writes into them
            processor = AutoProcessor.from_pretrained(where, trust_remote_code=recipe.trust_remote_code, **asked)
        except (OSError, ValueError) as error:
            raise UserError(f"vlm2vec.processor: {where} cannot be read ({one_line(error, 200)})") from None
        check_settings(processor, recipe.processor_settings)
        settings = settings or recipe_config(recipe, processor.tokenizer)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:  # transformers writes down what it was made with alone
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = recipe.padding_side
    return processor, settings


def _config_from(name: str, trust: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except OSError as error:
        raise UserError(f"vlm2vec.name_or_path: {name} cannot be read ({one_line(error, 200)})") from None
    except ValueError as error:
        raise (
            _untrusted(name)
            if "trust_remote_code" in str(error)
            else UserError(f"vlm2vec.name_or_path: {name}: {one_line(error, 200)}")
        ) from None


def _loader(settings: Any, trust: bool) -> Any:
    """The auto class that loads this backbone."""
    remote = getattr(settings, "auto_map", None) or {}
    if type(settings) in AutoModelForImageTextToText._model_mapping or "AutoModelForImageTextToText" in remote:
        auto: Any = AutoModelForImageTextToText
    elif "AutoModelForCausalLM" in remote:
        auto = AutoModelForCausalLM  # where Phi-3.5-V registers itself
    else:
        raise UserError(
            f"vlm2vec.name_or_path: {settings.model_type!r} is no AutoModelForImageTextToText; take a model that is one"
        )
    if type(settings) not in auto._model_mapping and not trust:
        raise _untrusted(settings._name_or_path)
    return auto


def _untrusted(name: str) -> UserError:
    return UserError(
        f"vlm2vec.trust_remote_code: {name} brings code of its own; read it, and set this to true if you trust it "
        "(of a trained model: --trust-remote-code, or trust_remote_code=True of from_pretrained)"
    )
