"""A language model's head that also gives the loss of its logits, without ever holding them whole.

With a vocabulary of 32,000 the logits of a chunk outweigh its activations. Here
they are made a piece of the rows at a time, and gradients are kept instead: a
piece's own in closed form, (softmax - one at the label). It is done inside the
head's own forward, because ZeRO-3 gathers a weight for the forward of the module
that owns it; the backward pass needs no weight any more.

Under bf16 the sums over pieces (the loss, the gradients of weights and bias) are
fp32, and so is the factor that the loss's gradient comes with; all are rounded
once, if at all, to what autograd sums for the parameter. (torch's own
`linear_cross_entropy` adds every piece to a bf16 sum and rounds the factor too.)

Some models do more than their head does: Cohere and Granite scale the logits,
Gemma2 caps them by a tanh. Under one name of a config one model multiplies and
another divides, so no list of names is asked: `finish_of` sends numbers through
the model's own forward and reads off what happens to them.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPast

from curation.errors import UserError, one_line

PIECE = 2**24
"""Logits that are there at once: 64 MiB. With fewer rows, summing the gradient of the weights, whole for each piece,
would take nearly all of a narrow model's time (128 numbers before 49,408 words)."""


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
        """hidden [..., H] -> logits [..., V]; with labels [n] of 0 .. V - 1, of hidden [n, H]: the sum of -log p(label)
        [], fp32 (fp64 of fp64)."""
        if labels is None:
            return super().forward(hidden)
        finish = self.scale, self.cap, max(1, PIECE // self.out_features), torch.is_grad_enabled()
        return _SummedLoss.apply(hidden, self.weight, self.bias, labels, *finish)


class _SummedLoss(torch.autograd.Function):
    """`Head`'s loss and its gradients, `size` rows at a time. graph: whether gradients are asked for at all."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        cap: float | None,
        size: int,
        graph: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Of products: a GPU gives those of bf16 in fp32; a CPU does not, and takes fp32 ones.
        factors = wide if hidden.device.type == "cpu" else hidden.dtype
        settings: Any = {} if factors == wide else {"out_dtype": wide}
        asked = [graph and needed for needed in ctx.needs_input_grad[:3]]
        of_hidden = torch.empty_like(hidden) if asked[0] else None
        of_weight = torch.zeros_like(weight, dtype=wide) if asked[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if asked[2] and bias is not None else None
        total, table = hidden.new_zeros((), dtype=wide), weight.to(factors)
        room = hidden.new_empty(min(size, len(hidden)), len(weight), dtype=wide)  # for all pieces
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            states, at = hidden[rows].to(factors), labels[rows, None]
            x = room[: len(states)]  # [r, V]: the logits, and all that becomes of them
            torch.mm(states, table.T, out=x, **settings)
            if bias is not None:
                x += bias
            if scale != 1:
                x *= scale
            slope = None
            if cap is not None:
                x.div_(cap).tanh_()
                slope = 1 - x.square()
                x *= cap
            x -= x.amax(1, keepdim=True)
            total -= x.gather(1, at).sum()
            x.exp_()
            whole = x.sum(1, keepdim=True)
            total += whole.log().sum()
            if not any(asked):
                continue
            x *= whole.reciprocal()
            x.scatter_(1, at, x.gather(1, at) - 1)
            if slope is not None:
                x *= slope
            if scale != 1:
                x *= scale
            if of_bias is not None:
                of_bias += x.sum(0)
            given = x.to(factors)
            if of_hidden is not None:
                of_hidden[rows] = given @ table
            if of_weight is not None:
                torch.addmm(of_weight, given.T, states, out=of_weight, **settings)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:  # type: ignore[override]
        # In place, for room; a vector of one keeps the factor's digits beside bf16, where a scalar would be rounded.
        found = [None if x is None else x.mul_(factor.view(1)) for x in ctx.saved_tensors]
        return *found, None, None, None, None, None


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
