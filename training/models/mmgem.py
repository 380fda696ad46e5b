"""MM-GEM: one causal LLM that embeds texts and writes captions, and a ViT (arXiv 2405.19333, section 3). Stage 1:

    V      = ViT(image)                        [B, N, Dv]  feature map
    V_emb  = h1(V)                             [B, N, E]
    image  = unit(mean_N V_emb)                [B, E]      PoolAggregator of stage 1
    text   = unit(h2(LLM(caption [EMB])))      [B, E]      hidden state at [EMB]
    V_in   = h3(mean_N V_emb)                  [B, 1, H]
    L_gen  = CE(LLM(V_in [CAP] caption) -> caption </s>)

What stage 2 adds for regions, soft prompts and h4, and how it trains, is training/models/mmgem_regions.py.

Both passes through the LLM are stacked on the batch axis where both are asked
for, so that ZeRO-3 gathers each layer once. Captions are padded on the right:
under a causal mask no real token sees padding, so no mask is built.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from curation.errors import UserError
from training.config import ObjectiveConfig
from training.family_config import LanguageConfig, VisionConfig
from training.models import mmgem_regions
from training.models.dropout import stacked
from training.models.head import Head, finish_of
from training.models.kind import check_kind, opened_model, whole
from training.models.patches import only
from training.models.scalars import add_scalars, read_scalars
from training.models.vision import pretrained_tower, vision_tower
from training.partitioned import lasting_sources
from training.tokenizer import CAP, EMB

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""open_clip's image statistics."""


class MMGemConfig(PretrainedConfig):
    """vision_config: open_clip's vision_cfg · text_config: the LLM's own config, as a dict ·
    objective: the coupled loss's section of the recipe (which scalars there are, and where they begin) ·
    prompts, h4: the parts of stage 2 that the model has."""

    model_type = "mmgem"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        embed_dim: int = 512,
        emb_token_id: int = 0,
        cap_token_id: int = 0,
        eos_token_id: int = 0,
        pad_token_id: int = 0,
        objective: dict[str, Any] | None = None,
        prompts: int = 0,
        h4: bool = False,
        image_mean: tuple[float, ...] = MEAN,
        image_std: tuple[float, ...] = STD,
        resize_mode: str = "squash",
        interpolation: str = "bicubic",
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config or asdict(VisionConfig())
        self.text_config = text_config or {}
        self.embed_dim = embed_dim
        self.emb_token_id, self.cap_token_id = emb_token_id, cap_token_id
        self.objective = objective or {}
        self.prompts, self.h4 = prompts, h4
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resize_mode, self.interpolation = resize_mode, interpolation
        super().__init__(**{"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, **kwargs})

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own config: its LLM is configured by the dict."""
        return self


class MMGem(PreTrainedModel):
    """A model that embeds images and texts in one space and captions images."""

    config_class = MMGemConfig
    base_model_prefix = "mmgem"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = {"ResidualAttentionBlock", "LlamaDecoderLayer"}  # noqa: RUF012

    def __init__(self, config: MMGemConfig) -> None:
        super().__init__(config)
        text = dict(config.text_config)
        # The LLM is of the family's own precision, and drops nothing: the second pass stacks two sequences, so masks
        # drawn there would not be those of the first. (Those of an adapter are: training/models/dropout.py.)
        text_config = AutoConfig.for_model(text.pop("model_type", "llama"), **{**text, "dtype": None})
        for name, value in text_config.to_dict().items():
            if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
                setattr(text_config, name, 0.0)
        self.vision: Any = vision_tower(config.vision_config)
        self.llm = AutoModelForCausalLM.from_config(text_config)
        head = Head.of(self.llm.get_output_embeddings())
        self.llm.set_output_embeddings(head)
        head.scale, head.cap = finish_of(self.llm)
        self.blocks = {"ResidualAttentionBlock", *(self.llm._no_split_modules or ())}
        width, hidden = self.vision.conv1.out_channels, text_config.hidden_size
        self.h1 = nn.Linear(width, config.embed_dim)
        self.h2 = nn.Linear(hidden, config.embed_dim)
        self.h3 = nn.Linear(config.embed_dim, hidden)
        self.h4 = nn.Linear(config.embed_dim, config.embed_dim) if config.h4 else None
        self.prompts = nn.Parameter(0.02 * torch.randn(config.prompts, hidden)) if config.prompts else None
        self.scalars = add_scalars(self, ObjectiveConfig(**config.objective))
        self.stage2: str | None = None
        self.separable: tuple[str, ...] = ("generate",)
        self.post_init()

    def checkpoint_activations(self) -> None:
        """Keep the blocks' inputs alone, and compute the rest again in the backward pass."""
        self.vision.set_grad_checkpointing()
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    def _init_weights(self, module: nn.Module) -> None:
        """The towers have initialised themselves as their own libraries do; only h1 to h4 are ours."""
        if module is self.h4 and isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and module in (self.h1, self.h2, self.h3):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "MMGem":
        """
        Raises:
            UserError: the folder holds another family's model, or lacks weights.
        """
        name, field = pretrained_model_name_or_path, f"{cls.__name__}.from_pretrained"
        check_kind(name, cls.config_class.model_type, field)
        return whole(partial(super().from_pretrained, name, *args), name, field, **kwargs)

    @classmethod
    def from_backbones(cls, vision: VisionConfig, language: LanguageConfig, tokenizer: Any, **settings: Any) -> "MMGem":
        """Build from the recipe: pretrained towers where it names them, else towers from scratch."""
        sizes, weights = pretrained_tower(vision)
        if language.name_or_path:
            pretrained = opened_model(AutoModelForCausalLM, language.name_or_path, "mmgem.language.name_or_path")
            if pretrained.get_input_embeddings().num_embeddings < len(tokenizer):  # never cut: some have spare rows
                pretrained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            text_config = pretrained.config.to_dict()
        else:
            llama = {k: v for k, v in asdict(language).items() if k != "name_or_path"}
            text_config = LlamaConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **llama,
            ).to_dict()
        config = cls.config_class(
            vision_config=sizes,
            text_config=text_config,
            emb_token_id=tokenizer.convert_tokens_to_ids(EMB),
            cap_token_id=tokenizer.convert_tokens_to_ids(CAP),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
        model = cls(config)
        with lasting_sources():
            if language.name_or_path:
                model.llm.load_state_dict(pretrained.state_dict())
            if weights is not None:
                model.vision.load_state_dict(weights)
        return model

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the ViT's patches."""
        rows, columns = self.vision.grid_size
        return rows, columns

    def feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """V: [B, 3, S, S] -> [B, N, Dv], patches row by row."""
        _, patches = self.vision(pixel_values.to(self.vision.conv1.weight.dtype))
        return patches

    def _pooled(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """mean_N h1(V): [B, 3, S, S] -> [B, E]; over the patches of `kept` [B, keep] alone where it is given."""
        with only(self.vision, kept):
            patches = self.feature_map(pixel_values)
        return self.h1(patches).mean(1)

    def pooled_region(self, patches: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        """h1 of regions: V [B, N, Dv] and weights [B, N] of one region each (training/regions.py) -> [B, E]."""
        found = torch.einsum("bn,bnd->bd", regions.to(patches.device).float(), patches.float())
        return self.h1(found.to(patches.dtype))

    def region_embedding(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit embeddings of `pooled_region`'s [B, E], fp32; through h4 where stage 2 has made one."""
        return F.normalize((pooled if self.h4 is None else self.h4(pooled)).float(), dim=-1)

    def caption_prompt(self, pooled: torch.Tensor) -> torch.Tensor:
        """h3 and [CAP], or the soft prompts in its place: [B, E] -> [B, 1 + P, H]."""
        ids = torch.full((1,), self.config.cap_token_id, device=pooled.device)
        cap = self.llm.get_input_embeddings()(ids) if self.prompts is None else self.prompts
        return torch.cat([self.h3(pooled)[:, None], cap.expand(len(pooled), -1, -1)], 1)

    def at_emb(self, hidden: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Unit text embeddings from hidden states [B, T, H]; [EMB] stands at position `length`."""
        at = hidden[torch.arange(len(hidden), device=hidden.device), length]
        return F.normalize(self.h2(at).float(), dim=-1)

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk of pairs -> the fields of `gradient_cache.Outputs`, as a dict: ZeRO-3's hooks look into no other.

        chunk: pixel_values [B, 3, S, S] · input_ids [B, T] caption, [EMB], padding ·
        length [B] of the caption · labels [B, T] caption, </s>, then -100 · valid [B] ·
        patches [B, keep] that the ViT sees, all without it · negative.input_ids [B, m - 1, T'], negative.length
        [B, m - 1]: hard negative captions of each row, none without it · regions [B, N] in stage 2.
        """
        if self.stage2 is not None:
            return mmgem_regions.outputs(self, chunk, separable)
        pooled = self._pooled(chunk["pixel_values"], chunk.get("patches"))
        embed = self.llm.get_input_embeddings()
        ids, length = _texts(chunk)  # [B m, T], [B m]
        tokens = embed(ids)  # [B m, T, H]
        image = F.normalize(pooled.float(), dim=-1)
        b, n = len(pooled), len(tokens)
        if not separable:
            with stacked(n, b, 1):
                hidden = self.llm.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
            text = self.at_emb(hidden, length)
            return {"left": image, "right": _by_row(text, b), "scalars": read_scalars(self)}

        generation = torch.cat([self.caption_prompt(pooled), tokens[:: n // b, :-1]], 1)  # [B, T + 1, H]
        both = torch.cat([F.pad(tokens, (0, 0, 0, 1)), generation])  # [B m + B, T + 1, H]
        hidden = self.llm.base_model(inputs_embeds=both, use_cache=False).last_hidden_state
        labels = torch.where(chunk["valid"][:, None], chunk["labels"], -100)
        counted = labels >= 0
        total = self.llm.get_output_embeddings()(hidden[n:, 1 : 1 + labels.shape[1]][counted], labels[counted])
        text = self.at_emb(hidden[:n], length)
        return {"left": image, "right": _by_row(text, b), "scalars": read_scalars(self), "sums": {"generate": total}}

    def counts(self, chunk: Any) -> dict[str, float]:
        """Tokens to be predicted in the chunk, known before any forward pass."""
        if not self.separable:
            return {}
        return {"generate": float((chunk["labels"][chunk["valid"]] >= 0).sum())}

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit image embeddings [B, E]; `last_hidden_state`: the feature map V [B, N, Dv]."""
        patches = self.feature_map(pixel_values)
        pooled = F.normalize(self.h1(patches).mean(1).float(), dim=-1)
        return BaseModelOutputWithPooling(pooler_output=pooled, last_hidden_state=patches)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit text embeddings [B, E]; `last_hidden_state` [B, T, H]. A text is embedded at its last
        [EMB], and padded on the right.

        Raises:
            UserError: a row without [EMB], or padded on the left.
        """
        ends = input_ids == self.config.emb_token_id  # [B, T]
        if attention_mask is not None:
            if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
                raise UserError("attention_mask: has padding before a text; pad on the right, as the processor does")
            ends = ends & attention_mask.bool()
        if not bool(ends.any(1).all()):
            row = int((~ends.any(1)).nonzero()[0])
            raise UserError(
                f"input_ids: row {row} has no {EMB}, at which a text is embedded; make them with the model's processor"
            )
        at = input_ids.shape[1] - 1 - ends.flip(1).int().argmax(1)  # [B]
        hidden = self.llm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return BaseModelOutputWithPooling(pooler_output=self.at_emb(hidden, at), last_hidden_state=hidden)

    def get_region_features(self, patches: torch.Tensor, regions: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit embeddings [B, E] of the regions [B, N] of the feature maps [B, N, Dv]."""
        return BaseModelOutputWithPooling(pooler_output=self.region_embedding(self.pooled_region(patches, regions)))

    @torch.no_grad()
    def heat_map(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Cosine of each patch, as a region of its own, with its row's text: [B, 3, S, S], [B, T] -> [B, h, w]."""
        patches = self.region_embedding(self.h1(self.feature_map(pixel_values)))  # [B, N, E]
        text = self.get_text_features(input_ids).pooler_output
        return torch.einsum("bne,be->bn", patches, text).unflatten(1, self.grid)

    @torch.no_grad()
    def generate(self, pixel_values: torch.Tensor, max_new_tokens: int = 50, **kwargs: Any) -> torch.Tensor:
        """Caption token ids [B, T] (greedy unless asked otherwise); ends with </s>, then padding."""
        return self._written(self._pooled(pixel_values), max_new_tokens, **kwargs)

    @torch.no_grad()
    def generate_region(
        self, patches: torch.Tensor, regions: torch.Tensor, max_new_tokens: int = 50, **kwargs: Any
    ) -> torch.Tensor:
        """As `generate`, of the regions [B, N] of the feature maps [B, N, Dv]."""
        return self._written(self.pooled_region(patches, regions), max_new_tokens, **kwargs)

    def _written(self, pooled: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
        prompt = self.caption_prompt(pooled)
        return self.llm.generate(
            inputs_embeds=prompt,
            attention_mask=prompt.new_ones(prompt.shape[:2], dtype=torch.long),
            max_new_tokens=max_new_tokens,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            **{"do_sample": False, **kwargs},
        )


def _texts(chunk: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions and their hard negatives, row by row: ids [B m, T] padded on the right, lengths [B m]."""
    ids, length = chunk["input_ids"], chunk["length"]
    if "negative.input_ids" not in chunk:
        return ids, length
    negative = chunk["negative.input_ids"]
    longest = max(ids.shape[1], negative.shape[2])
    both = [F.pad(x, (0, longest - x.shape[-1])) for x in (ids[:, None], negative)]
    return torch.cat(both, 1).flatten(0, 1), torch.cat([length[:, None], chunk["negative.length"]], 1).flatten()


def _by_row(text: torch.Tensor, b: int) -> torch.Tensor:
    """[B m, E] -> [B, m, E], or as it is for m = 1."""
    return text if len(text) == b else text.unflatten(0, (b, -1))
