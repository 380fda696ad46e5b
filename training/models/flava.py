"""FLAVA: image, text and multimodal encoders under a contrastive and five other losses (arXiv 2112.04482, section 3).

    image  = unit(P_i(image encoder(picture)[CLS]))             [B, E]   the pair's sides of the global contrastive loss
    text   = unit(P_t(text encoder(caption)[CLS]))              [B, E]
    M      = multimodal encoder([CLS_M] Q_i(I) Q_t(T))          [B, 1 + (1 + N) + L, D]
             I [B, 1 + N, D], T [B, L, D]: states of the masked picture and caption before their encoders' last norm
    itm        match or not, from M at [CLS_M]
    mmm_image  codes of masked patches from M     mim  the same from the image encoder alone, in batches of pictures
    mmm_text   masked tokens from M               mlm  the same from the text encoder alone, in batches of texts

Encoders and heads are transformers' own modules, so its checkpoints load; what
its `FlavaForPreTraining` does around them (means over a chunk, a gather inside
the forward, labels written over) does not fit a cached step and is written anew:
losses are sums over units, and the contrastive loss is the engine's.

A chunk holds pictures, texts or both, the same kind on every rank. Clean and
masked inputs run stacked, so that ZeRO-3 gathers each layer once.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import FlavaImageConfig, FlavaMultimodalConfig, FlavaTextConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.flava.modeling_flava import (
    FlavaImageModel,
    FlavaITMHead,
    FlavaMaskedPredictionHead,
    FlavaMultimodalModel,
    FlavaTextModel,
)
from transformers.utils.generic import can_return_tuple

from curation.errors import UserError
from training.config import ObjectiveConfig
from training.family_config import LOSSES, FlavaRecipe
from training.models.dropout import stacked
from training.models.head import Head
from training.models.kind import check_kind, opened_model, whole
from training.models.mmgem import MEAN, STD
from training.models.patches import KeptPatches, only
from training.models.scalars import add_scalars, read_scalars, unsaid
from training.partitioned import lasting_sources

THEIRS = re.compile(r"^image_codebook\.|_model\.pooler\.|_head\.bias$")
"""What transformers' checkpoints have and we do not: its codebook, poolers that no loss uses, second names of
`decoder.bias`."""


class FlavaConfig(PretrainedConfig):
    """image_config, text_config, multimodal_config: those of transformers' FLAVA encoders, as dicts ·
    objective: the coupled loss's section of the recipe (which scalars there are, and where they begin)."""

    model_type = "gemsmith_flava"

    def __init__(
        self,
        image_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        multimodal_config: dict[str, Any] | None = None,
        embed_dim: int = 768,
        objective: dict[str, Any] | None = None,
        image_mean: tuple[float, ...] = MEAN,
        image_std: tuple[float, ...] = STD,
        resize_mode: str = "squash",
        **kwargs: Any,
    ) -> None:
        self.image_config, self.text_config = image_config or {}, text_config or {}
        self.multimodal_config = multimodal_config or {}
        self.embed_dim, self.objective = embed_dim, objective or {}
        self.image_mean, self.image_std, self.resize_mode = list(image_mean), list(image_std), resize_mode
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own config: its text encoder is configured by the dict."""
        return self


class Flava(PreTrainedModel):
    """A model that embeds images and texts in one space, and pairs of them in another."""

    config_class = FlavaConfig
    base_model_prefix = "gemsmith_flava"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = {"FlavaLayer"}  # noqa: RUF012
    blocks = frozenset({"FlavaLayer"})
    separable = LOSSES["flava"]

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__(config)
        image, text = FlavaImageConfig(**config.image_config), FlavaTextConfig(**config.text_config)
        both = FlavaMultimodalConfig(**config.multimodal_config)
        for c in (image, text, both):  # masks drawn for stacked inputs would not be those of the first pass
            c.hidden_dropout_prob = c.attention_probs_dropout_prob = 0.0
        # Without poolers, which no loss uses.
        self.image_model = FlavaImageModel(image, add_pooling_layer=False)
        self.image_model.embeddings.add_module("dropout", KeptPatches())
        self.text_model = FlavaTextModel(text, add_pooling_layer=False)
        self.multimodal_model = FlavaMultimodalModel(both, add_pooling_layer=False)
        self.image_projection = nn.Linear(image.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim)
        self.image_to_mm_projection = nn.Linear(image.hidden_size, both.hidden_size)
        self.text_to_mm_projection = nn.Linear(text.hidden_size, both.hidden_size)
        self.mim_head, self.mmm_image_head = FlavaMaskedPredictionHead(image), FlavaMaskedPredictionHead(image)
        self.mlm_head, self.mmm_text_head = FlavaMaskedPredictionHead(text), FlavaMaskedPredictionHead(text)
        for head in (self.mim_head, self.mmm_image_head, self.mlm_head, self.mmm_text_head):
            del head.bias  # a second name of `decoder.bias`
            head.decoder = Head.of(head.decoder)
        self.itm_head = FlavaITMHead(both)
        self.scalars = add_scalars(self, ObjectiveConfig(**config.objective))
        self.pad_token_id: Any = text.pad_token_id
        self.post_init()
        # transformers begins these at zero, where the first LayerNorm (eps 1e-12) multiplies their gradients by a
        # million: a clipped step would be theirs alone.
        image_tokens = self.image_model.embeddings
        tokens: list[Any] = [image_tokens.cls_token, image_tokens.mask_token, image_tokens.position_embeddings]
        for token in [*tokens, self.multimodal_model.cls_token]:
            nn.init.trunc_normal_(token, std=0.02)

    def checkpoint_activations(self) -> None:
        """Keep the blocks' inputs alone, and compute the rest again in the backward pass."""
        self.gradient_checkpointing_enable({"use_reentrant": False})

    def _init_weights(self, module: nn.Module) -> None:
        """The encoders initialise themselves; the heads and projections in the same way."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_recipe(cls, recipe: FlavaRecipe, tokenizer: Any, **settings: Any) -> "Flava":
        """Build from the recipe: from scratch, or with the weights of a transformers checkpoint.

        Raises:
            UserError: the checkpoint is of another family, of other sizes or another number of layers.
        """
        shared = {
            "hidden_size": recipe.hidden_size,
            "intermediate_size": recipe.intermediate_size,
            "num_attention_heads": recipe.num_attention_heads,
        }
        image = {"image_size": recipe.image_size, "patch_size": recipe.patch_size}
        image |= {"num_hidden_layers": recipe.image_layers, "vocab_size": recipe.codebook.vocab_size}
        text = {"num_hidden_layers": recipe.text_layers, "max_position_embeddings": recipe.max_position_embeddings}
        text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = FlavaConfig(
            image_config=shared | image,
            text_config=shared | text,
            multimodal_config=shared | {"num_hidden_layers": recipe.multimodal_layers},
            embed_dim=recipe.embed_dim,
            **settings,
        )
        model = cls(config)
        if recipe.name_or_path is not None:
            model._load_published(recipe.name_or_path)
        return model

    def _load_published(self, name_or_path: str) -> None:
        from transformers import FlavaForPreTraining

        check_kind(name_or_path, "flava", "flava.name_or_path")
        published = opened_model(FlavaForPreTraining, name_or_path, "flava.name_or_path", THEIRS.pattern).state_dict()
        published = {name.removeprefix("flava."): tensor for name, tensor in published.items()}
        published = {name: tensor for name, tensor in published.items() if not THEIRS.search(name)}
        published["log_scale"] = published.pop("logit_scale").reshape(1)
        own = {name: tensor for name, tensor in self.state_dict().items() if name != "logit_bias"}
        for name in sorted(published.keys() | own.keys()):
            there, here = (list(side[name].shape) if name in side else "missing" for side in (published, own))
            if there != here:
                raise UserError(
                    f"flava.name_or_path: {name_or_path}: {name} is {there} there and {here} in the recipe; "
                    "give the checkpoint's sizes, layers, tokenizer and codebook"
                )
        with lasting_sources():
            self.load_state_dict(unsaid(self.config.objective, published), strict=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "Flava":
        """
        Raises:
            UserError: the folder holds another family's model, or lacks weights.
        """
        name, field = pretrained_model_name_or_path, "Flava.from_pretrained"
        check_kind(name, FlavaConfig.model_type, field)
        return whole(partial(super().from_pretrained, name, *args), name, field, **kwargs)

    def _image(self, pixels: torch.Tensor, kept: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> Any:
        """Encoder's output for [B, 3, S, S]: of the patches `kept` [B, keep] alone where it is given; `hidden` bool
        [B, N] names the masked ones."""
        with only(self.image_model, kept):
            return self.image_model(
                pixels.to(self.image_model.embeddings.cls_token.dtype),
                bool_masked_pos=hidden,
                output_hidden_states=hidden is not None,
            )

    def _embedded(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
        """The contrastive sides from last states [B, 1 + N, D] and [B, L, D]."""
        return {
            "left": F.normalize(self.image_projection(image[:, 0]).float(), dim=-1),
            "right": F.normalize(self.text_projection(text[:, 0]).float(), dim=-1),
            "scalars": read_scalars(self),
        }

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk -> the fields of `gradient_cache.Outputs`, as far as its kind has them.

        chunk: pixel_values [B, 3, S, S] · image_mask bool [B, N] · image_labels [B, N] codes ·
        input_ids, attention_mask, masked_ids [B, L] · text_labels [B, L] tokens ·
        itm_labels [B] 1 match, 0 mismatch · coupled [B] rows of the contrastive loss ·
        patches [B, keep] that the image encoder sees, all without it.
        Labels are -100 where none is asked. Pictures alone lack the texts' tensors, and texts the pictures'.
        """
        if "input_ids" not in chunk:
            if not separable:
                return {}
            image = self._image(chunk["pixel_values"], chunk.get("patches"), chunk["image_mask"])
            mim = _sum_at_labels(self.mim_head, image.last_hidden_state[:, 1:], _image_labels(chunk))
            return {"sums": {"mim": mim}}
        ids, attention = chunk["input_ids"], chunk["attention_mask"]
        if "pixel_values" not in chunk:
            if not separable:
                return {}
            states = self.text_model(chunk["masked_ids"], attention_mask=attention).last_hidden_state
            return {"sums": {"mlm": _sum_at_labels(self.mlm_head, states, chunk["text_labels"])}}
        pixels, hidden, kept, b = chunk["pixel_values"], chunk["image_mask"], chunk.get("patches"), len(ids)
        if not separable:
            with stacked(b, b):
                image, text = self._image(pixels, kept), self.text_model(ids, attention_mask=attention)
            return self._embedded(image.last_hidden_state, text.last_hidden_state)

        image = self._image(
            torch.cat([pixels, pixels]),
            None if kept is None else torch.cat([kept, kept]),
            torch.cat([torch.zeros_like(hidden), hidden]),
        )
        text = self.text_model(
            torch.cat([ids, chunk["masked_ids"]]),
            attention_mask=torch.cat([attention, attention]),
            output_hidden_states=True,
        )
        embedded = self._embedded(image.last_hidden_state[:b], text.last_hidden_state[:b])  # in the first pass's order
        joint = self._joint(image.hidden_states[-1][b:], text.hidden_states[-1][b:], attention)
        n = image.last_hidden_state.shape[1] - 1
        match = F.cross_entropy(
            self.itm_head(joint).float(), chunk["itm_labels"], ignore_index=-100, reduction="sum"
        )  # [CLS_M] is at 0, [CLS_I] at 1, patches from 2, tokens at the end
        sums = {
            "itm": match,
            "mmm_image": _sum_at_labels(self.mmm_image_head, joint[:, 2 : 2 + n], _image_labels(chunk)),
            "mmm_text": _sum_at_labels(self.mmm_text_head, joint[:, 2 + n :], chunk["text_labels"]),
        }
        return {**embedded, "sums": sums}

    def _joint(self, image: torch.Tensor, text: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Multimodal states [B, 1 + (1 + N) + L, D] of states before the last norm."""
        states = torch.cat([self.image_to_mm_projection(image), self.text_to_mm_projection(text)], 1)
        seen = torch.cat([attention.new_ones(len(image), 1 + image.shape[1]), attention], 1)
        return self.multimodal_model(states, attention_mask=seen).last_hidden_state

    @staticmethod
    def counts(chunk: Any) -> dict[str, float]:
        """Units of each sum of the chunk: masked patches, masked tokens, pairs; known before any forward pass."""
        image, text = "pixel_values" in chunk, "input_ids" in chunk
        asked = {
            ("mmm_image" if text else "mim"): _image_labels(chunk) if image else None,
            ("mmm_text" if image else "mlm"): chunk["text_labels"] if text else None,
            "itm": chunk["itm_labels"] if image and text else None,
        }
        return {name: float((labels >= 0).sum()) for name, labels in asked.items() if labels is not None}

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit image embeddings [B, E]; `last_hidden_state` [B, 1 + N, D]."""
        states = self._image(pixel_values).last_hidden_state
        pooled = F.normalize(self.image_projection(states[:, 0]).float(), dim=-1)
        return BaseModelOutputWithPooling(pooler_output=pooled, last_hidden_state=states)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit text embeddings [B, E]; `last_hidden_state` [B, L, D]. Padding is masked by itself."""
        mask = input_ids.ne(self.pad_token_id).long() if attention_mask is None else attention_mask
        states = self.text_model(input_ids, attention_mask=mask).last_hidden_state
        pooled = F.normalize(self.text_projection(states[:, 0]).float(), dim=-1)
        return BaseModelOutputWithPooling(pooler_output=pooled, last_hidden_state=states)

    @can_return_tuple
    def get_multimodal_features(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: the state at [CLS_M] [B, D] of unmasked pairs; `last_hidden_state` [B, 2 + N + L, D]."""
        mask = input_ids.ne(self.pad_token_id).long() if attention_mask is None else attention_mask
        image = self.image_model(
            pixel_values.to(self.image_model.embeddings.cls_token.dtype), output_hidden_states=True
        ).hidden_states[-1]
        text = self.text_model(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        states = self._joint(image, text, mask)
        return BaseModelOutputWithPooling(pooler_output=states[:, 0], last_hidden_state=states)


def _image_labels(chunk: Any) -> torch.Tensor:
    """Codes of the patches that the image encoder sees, [B, keep] or [B, N]; -100 where none is asked."""
    labels = chunk["image_labels"]
    return labels.gather(1, chunk["patches"]) if "patches" in chunk else labels


def _sum_at_labels(head: Any, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy summed over labels >= 0 of [B, T]; the vocabulary is scored there alone, a piece at a time."""
    asked = labels >= 0
    return head.decoder(head.transform(states[asked]), labels[asked])
