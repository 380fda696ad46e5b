"""Whether a step may be taken: its loss and gradient are finite, and the loss is not far above the recent ones.

All values are global already, so every rank decides the same without asking.
A step that may not be taken is left out: weights and moments stay, the data
goes on. Many in a row mean that the weights are past saving, and end the run.
"""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from curation.errors import UserError

WINDOW = 100
"""Losses that the median is taken over; none is judged against fewer than a tenth of that."""


class Health:
    """Judges the steps of a run, one after the other.

    Args:
        max_ratio: skip a loss above so many times the running median; None = only what is not finite.
        max_skipped: skipped steps in a row that the run survives.
        losses: `self.losses` of the run before, from its checkpoint, so that a resumed run judges alike.
    """

    def __init__(self, *, max_ratio: float | None, max_skipped: int, losses: Iterable[float] = ()) -> None:
        self.max_ratio, self.max_skipped = max_ratio, max_skipped
        self.losses: deque[float] = deque(losses, maxlen=WINDOW)
        self.skipped = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def skip(self, step: int, loss: float, grad_norm: float | None = None) -> str | None:
        """Why step `step` must not be taken; None where it may. `grad_norm` None: not known yet.

        Raises:
            UserError: more than `max_skipped` in a row.
        """
        why = self.trouble(loss, grad_norm)
        if why is None:
            self.in_a_row = 0
            self.losses.append(loss)
            return None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.max_skipped:
            raise UserError(
                f"optim.max_skipped: {self.in_a_row} steps in a row could not be taken, at step {step} because {why}; "
                "lower optim.lr or raise optim.warmup_steps, and resume from the last checkpoint"
            )
        return why

    def trouble(self, loss: float, grad_norm: float | None) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if self.max_ratio is not None and len(self.losses) >= WINDOW // 10:
            usual = median(self.losses)
            if loss > self.max_ratio * usual:
                return f"the loss is {loss:.4g}, above optim.max_loss_ratio {self.max_ratio:g} x the median {usual:.4g}"
        return None
