"""A language model's head that also gives the loss of its logits, without ever holding them whole.

With a vocabulary of 32,000 the logits of a chunk outweigh its activations.
torch's chunked `linear_cross_entropy` makes them a piece at a time and keeps
gradients instead. It is called inside the head's own forward, because ZeRO-3
gathers a weight for the forward of the module that owns it.

Some models do more than their head does: Cohere and Granite scale the logits,
Gemma2 caps them by a tanh. Under one name of a config one model multiplies and
another divides, so no list of names is asked: `finish_of` sends numbers through
the model's own forward and reads off what happens to them.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from curation.errors import UserError, one_line

PIECE = 2**24
"""Logits that are there at once. torch's own choice, as many as the states have numbers, makes every piece so few rows
of a narrow model (4 of 128 numbers before 49,408 words) that summing the gradient of the weights, whole for each
piece, takes nearly all of the time."""


class Head(nn.Linear):
    """`nn.Linear` [H -> V]; given labels, the summed cross-entropy instead of the logits.

    scale, cap: what the model makes of the logits before that: cap tanh(scale logits / cap), or scale logits where
    cap is None. Without labels the model does it itself.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Head":
        """The same head, sharing its parameters."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., H] -> logits [..., V]; with labels [n] of hidden [n, H]: the sum of -log p(label) [], fp32."""
        if labels is None:
            return super().forward(hidden)
        bias: Any = self.bias
        if self.scale != 1:
            hidden, bias = hidden * self.scale, bias if bias is None else bias * self.scale
        size = max(1, PIECE // self.out_features)
        if self.cap is not None:
            parts = zip(hidden.split(size), labels.split(size), strict=True)
            settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.stack([checkpoint(self._capped, *part, bias, **settings) for part in parts]).sum()
        options: Any = LinearCrossEntropyOptions(batch_chunk_size=size)
        total = F.linear_cross_entropy(hidden, self.weight, labels, linear_bias=bias, reduction="sum", options=options)
        return total.float()

    def _capped(self, hidden: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self.cap is not None
        logits = F.linear(hidden, self.weight, bias)  # [n, V]
        return F.cross_entropy((self.cap * torch.tanh(logits / self.cap)).float(), labels, reduction="sum")


class _Given(BaseModelOutputWithPast):
    """A decoder's output, of whatever kind: only its states are asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def finish_of(llm: Any) -> tuple[float, float | None]:
    """(scale, cap) of a causal LM, as `Head` has them. No weight takes part, so it works on the meta device too.

    Raises:
        UserError: the model makes something else of its decoder's states or of its head's logits.
    """
    states = torch.arange(1.0, 5.0, dtype=torch.float64, device="cpu")  # [H'], as the decoder's
    raw = torch.tensor([1.0, -2.0, 3.0, 1e30], dtype=torch.float64, device="cpu")  # [V'], as the head's
    seen: list[torch.Tensor] = []
    head, stood_in = llm.get_output_embeddings(), {llm.base_model, llm.get_decoder()} - {llm, None}

    def logits(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(hidden.double().flatten())
        return raw[None, None]

    try:
        for part in stood_in:
            part.forward = lambda *_, **__: _Given(last_hidden_state=states[None, None])
        head.forward = logits
        found = llm(inputs_embeds=states[None, None], use_cache=False).logits.double().flatten()
    except Exception as error:  # whatever a forward of this kind asks for
        raise _unknown(llm, one_line(error, 120)) from None
    finally:
        for part in [*stood_in, head]:
            part.__dict__.pop("forward", None)
    before = float(seen[0][0])
    cap = float(found[-1]) if abs(float(found[-1])) < 1e20 else None
    scale = float(found[0]) if cap is None else float(cap * torch.atanh(found[0] / cap))
    wanted = scale * raw if cap is None else cap * torch.tanh(scale * raw / cap)
    if len(seen) != 1 or not torch.equal(seen[0], before * states):
        raise _unknown(llm, "its head reads other states than the decoder's")
    if found.shape != raw.shape or not torch.allclose(found, wanted, rtol=1e-5):
        raise _unknown(llm, "its logits are neither scaled nor capped by a tanh")
    scale *= before
    return (1.0 if abs(scale - 1) < 1e-6 else scale), cap


def _unknown(llm: Any, why: str) -> UserError:
    kind = llm.config.model_type
    return UserError(
        f"mmgem.language.name_or_path: how a {kind!r} makes its logits is not known here ({why}); take another"
    )
