"""A language model's head that also gives the loss of its logits, without ever holding them whole.

With a vocabulary of 32,000 the logits of a chunk outweigh its activations.
torch's chunked `linear_cross_entropy` makes them a piece at a time and keeps
gradients instead. It is called inside the head's own forward, because ZeRO-3
gathers a weight for the forward of the module that owns it.
"""

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

OPTIONS = LinearCrossEntropyOptions()


class Head(nn.Linear):
    """`nn.Linear` [H -> V]; given labels, the summed cross-entropy instead of the logits."""

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
        total = F.linear_cross_entropy(
            hidden, self.weight, labels, linear_bias=self.bias, reduction="sum", options=OPTIONS
        )
        return total.float()
