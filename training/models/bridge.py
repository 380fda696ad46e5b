"""LiMBeR and MAPL: all that trains is a mapping from a frozen ViT's patches to visual tokens of a frozen causal LM.

    V    = ViT(image)                            [B, N, Dv]  frozen
    V_in = mapping(V)                            [B, k, H]
    L    = CE(LLM(V_in caption) -> caption </s>)             through the frozen LLM

    linear       one layer, a visual token a patch, k = N (LiMBeR, arXiv 2209.15162, section 3)
    transformer  a narrow one over the patches and k learned vectors, whose states are the tokens (MAPL, arXiv
                 2210.07179, section 3)

It is MM-GEM's model (ViT and LLM by the same sections of the recipe) without
what that has for embedding: no h1 to h3, no [EMB] or [CAP], no temperature. So
a chunk has a separable loss alone and runs forward once. The recipe freezes
the backbones (`optim.groups`), which is also where one may thaw them.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from curation.errors import UserError
from training.family_config import MappingConfig
from training.models.mmgem import MMGem, MMGemConfig
from training.models.patches import only


class TransformerMapping(nn.Module):
    """MAPL's mapping network: down to `width`, pre-norm layers with ReLU, no dropout, and up again."""

    def __init__(self, vision: int, hidden: int, config: MappingConfig) -> None:
        super().__init__()
        self.down = nn.Linear(vision, config.width)
        self.tokens = nn.Parameter(torch.randn(config.tokens, config.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.heads, 2 * config.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.up = nn.Linear(config.width, hidden)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[B, N, Dv] -> [B, k, H]"""
        k = len(self.tokens)
        states = torch.cat([self.down(patches), self.tokens.expand(len(patches), -1, -1)], 1)  # [B, N + k, width]
        for layer in self.layers:
            states = layer(states)
        return self.up(states[:, -k:])


class BridgeConfig(MMGemConfig):
    """mapping: the recipe's section."""

    model_type = "mmgem_bridge"

    def __init__(self, mapping: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.mapping = mapping or {}
        super().__init__(**kwargs)


class Bridge(MMGem):
    """Captions images; embeds nothing."""

    config_class = BridgeConfig  # type: ignore[assignment]

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        vision, hidden = self.h1.in_features, self.h3.out_features
        for name in ("h1", "h2", "h3", *self.scalars):
            delattr(self, name)
        self.scalars = ()
        mapping = MappingConfig(**config.mapping)
        linear = mapping.kind == "linear"
        self.mapping = nn.Linear(vision, hidden) if linear else TransformerMapping(vision, hidden, mapping)
        self.blocks = {*self.blocks, "TransformerEncoderLayer"}

    def _init_weights(self, module: nn.Module) -> None:
        """Everything has initialised itself."""

    def _visual(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Visual tokens: [B, 3, S, S] -> [B, k, H]."""
        with only(self.vision, kept):
            return self.mapping(self.feature_map(pixel_values))

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """One chunk as MM-GEM's; only sums: "generate", of -log p over the tokens of valid captions and their </s>."""
        if not separable:
            return {}
        visual = self._visual(chunk["pixel_values"], chunk.get("patches"))
        k = visual.shape[1]
        words = self.llm.get_input_embeddings()(chunk["input_ids"][:, :-1])  # [B, T - 1, H]
        hidden = self.llm.base_model(inputs_embeds=torch.cat([visual, words], 1), use_cache=False).last_hidden_state
        labels = torch.where(chunk["valid"][:, None], chunk["labels"], -100)
        counted = labels >= 0  # [B, T]
        return {"sums": {"generate": self.llm.get_output_embeddings()(hidden[:, k - 1 :][counted], labels[counted])}}

    @torch.no_grad()
    def generate(self, pixel_values: torch.Tensor, max_new_tokens: int = 50, **kwargs: Any) -> torch.Tensor:
        """Caption token ids [B, T] (greedy unless asked otherwise); ends with </s>, then padding."""
        visual = self._visual(pixel_values)
        return self.llm.generate(
            inputs_embeds=visual,
            attention_mask=visual.new_ones(visual.shape[:2], dtype=torch.long),
            max_new_tokens=max_new_tokens,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            **{"do_sample": False, **kwargs},
        )

    def get_image_features(self, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        """
        Raises:
            UserError: always.
        """
        raise UserError(
            "mmgem.mapping: a mapping between frozen backbones captions and embeds nothing; grade captioning"
        )

    get_text_features = get_image_features
