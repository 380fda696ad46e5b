"""CoCa (arXiv 2205.01917) through open_clip: a dual encoder whose text tower goes on into a captioning decoder.

    left   = unit(image tower's first pooled token)           [B, D]
    right  = unit(text tower at its own [CLS])                [B, D]
    words  = text tower's states                              [B, T, W]
    hidden = decoder(words, looking at the other pooled tokens)
    L_gen  = CE(head(hidden) -> the next token)               a sum over tokens, divided by their global count

open_clip keeps the head as a matrix inside its decoder and makes all logits
[B, T, 49408]. Here it is a `Head`, which makes them a piece at a time; exports
and checkpoints have it where open_clip looks for it. The recipe weighs the
losses: `weights: {embed: 1.0, generate: 2.0}` are the paper's.
"""

from typing import Any

import torch
from torch import nn

from curation.errors import UserError
from training.config import ObjectiveConfig
from training.models.clip import Clip, plain
from training.models.clip_words import EOT, PAD, SOT
from training.models.head import Head
from training.partitioned import lasting_sources

OURS, THEIRS = "towers.text_decoder.head.weight", "text_decoder.text_projection"


class Coca(Clip):
    """open_clip's CoCa: `Clip`, and captions."""

    separable = ("generate",)
    blocks = frozenset({"ResidualAttentionBlock", "AttentionalPooler"})

    def __init__(self, model_cfg: dict[str, Any], objective: ObjectiveConfig, pretrained: Any = None) -> None:
        super().__init__(model_cfg, objective, pretrained)
        decoder = self.towers.text_decoder
        width, vocabulary = decoder.text_projection.shape
        decoder.head = Head(width, vocabulary, bias=False)
        with torch.no_grad(), lasting_sources():
            if pretrained is None:  # open_clip would begin with whatever its memory holds
                nn.init.normal_(decoder.head.weight, std=width**-0.5)
            else:
                decoder.head.weight.copy_(decoder.text_projection.T)
        decoder.text_projection = None

    @staticmethod
    def _towers(model_cfg: dict[str, Any]) -> Any:
        from open_clip.coca_model import CoCa

        return CoCa(**plain(model_cfg))

    def image(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, S, S] -> embeddings [B, D], pooled tokens [B, Q, D]."""
        return self.towers.visual(pixel_values)

    def text(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] -> embeddings [B, D], states [B, T, W]."""
        return self.towers.text(input_ids)

    def forward(self, chunk: Any, separable: bool = False) -> dict[str, Any]:
        """As `Clip.forward`; sums: "generate", of -log p over the tokens of valid captions after the first."""
        out, picture, words = self._both(chunk)
        if not separable:
            return out
        labels = _labels(chunk)
        counted = labels >= 0  # [c, T - 1]
        hidden = self.towers.text_decoder(picture, words[:, :-1])
        return {**out, "sums": {"generate": self.towers.text_decoder.head(hidden[counted], labels[counted])}}

    @staticmethod
    def counts(chunk: Any) -> dict[str, float]:
        """Tokens to be predicted in the chunk, known before any forward pass."""
        return {"generate": float((_labels(chunk) >= 0).sum())}

    @torch.no_grad()
    def generate(
        self, pixel_values: torch.Tensor, max_new_tokens: int = 50, min_new_tokens: int = 0, **settings: Any
    ) -> torch.Tensor:
        """Greedy caption token ids [B, T]: ends with <end_of_text>, then padding.

        Raises:
            UserError: beams or sampling are asked for.
        """
        if settings.pop("num_beams", 1) != 1 or settings.pop("do_sample", False) or settings:
            raise UserError("generate: CoCa writes greedy captions; ask for one beam and no sampling")
        _, picture = self.image(pixel_values.to(next(self.towers.visual.parameters()).dtype))
        ids = torch.full((len(picture), 1), SOT, device=picture.device)
        ended = torch.zeros(len(picture), dtype=torch.bool, device=picture.device)
        for number in range(min(max_new_tokens, self.towers.context_length - 1)):
            hidden = self.towers.text_decoder(picture, self.text(ids)[1])[:, -1]
            logits = self.towers.text_decoder.head(hidden)  # [B, V]
            logits[:, [PAD, SOT]] = -torch.inf
            if number < min_new_tokens:
                logits[:, EOT] = -torch.inf
            following = logits.argmax(1).masked_fill(ended, PAD)
            ids = torch.cat([ids, following[:, None]], 1)
            ended |= following == EOT
            if ended.all():
                break
        return ids[:, 1:]

    def to_open_clip(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = super().to_open_clip({name: x for name, x in state.items() if name != OURS})
        return tensors | {THEIRS: state[OURS].T.contiguous()}

    def from_open_clip(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = super().from_open_clip({name: x for name, x in tensors.items() if name != THEIRS})
        return state | {OURS: tensors[THEIRS].T.contiguous()}


def _labels(chunk: Any) -> torch.Tensor:
    """Next tokens [c, T - 1]; -100 for padding and holes."""
    following = chunk["input_ids"][:, 1:]
    return torch.where(chunk["valid"][:, None] & (following != PAD), following, -100)
