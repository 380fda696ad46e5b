"""Whether a step may be taken: its loss and gradient are finite, the loss not far above the recent ones of its kind.

All values are global already, so every rank decides the same without asking.
A step that may not be taken is left out: weights and moments stay, the data
goes on. Many in a row mean that the weights are past saving, and end the run.

In a mixture a step of pictures alone sums other losses than one of pairs, at
another scale: steps are compared with those that sum the same losses.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from curation.errors import UserError

WINDOW = 100
"""Losses of a kind that the median is taken over; none is judged against fewer than a tenth of that."""


def kind_of(metrics: Iterable[str]) -> str:
    """Of a step, by the names of its metrics: the losses that it sums, global as they are."""
    return "+".join(sorted(name.removeprefix("loss_") for name in metrics if name.startswith("loss_")))


class Health:
    """Judges the steps of a run, one after the other.

    Args:
        max_ratio: skip a loss above so many times the running median of its kind; None = only what is not finite.
        max_skipped: skipped steps in a row that the run survives.
    """

    def __init__(self, *, max_ratio: float | None, max_skipped: int) -> None:
        self.max_ratio, self.max_skipped = max_ratio, max_skipped
        self.losses: dict[str, deque[float]] = {}  # of steps taken, by kind
        self.skipped = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges alike."""
        losses = {kind: list(values) for kind, values in self.losses.items()}
        return {"losses": losses, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.losses = {kind: deque(values, maxlen=WINDOW) for kind, values in state["losses"].items()}
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def skip(self, step: int, loss: float, grad_norm: float | None = None, kind: str = "") -> str | None:
        """Why step `step` must not be taken; None where it may. `grad_norm` None: not known yet.

        Raises:
            UserError: more than `max_skipped` in a row.
        """
        why = self.trouble(loss, grad_norm, kind)
        if why is None:
            self.in_a_row = 0
            self.losses.setdefault(kind, deque(maxlen=WINDOW)).append(loss)
            return None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.max_skipped:
            raise UserError(
                f"optim.max_skipped: {self.in_a_row} steps in a row could not be taken, at step {step} because {why}; "
                "lower optim.lr or raise optim.warmup_steps, in another --out or with --overwrite"
            )
        return why

    def trouble(self, loss: float, grad_norm: float | None, kind: str = "") -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        recent = self.losses.get(kind, ())
        if self.max_ratio is not None and len(recent) >= WINDOW // 10:
            usual = median(recent)
            if loss > self.max_ratio * usual:
                return f"the loss is {loss:.4g}, above optim.max_loss_ratio {self.max_ratio:g} x the median {usual:.4g}"
        return None
