"""How many samples may be holes: a share of any stretch of the run, so that a bad shard is not lost in a long past.

One is always forgiven, where any are: else a single broken picture would end a run that has only begun, since one of
the first hundred is more than a hundredth of them. A picture that is said to have no regions is a hole and no error,
unless a whole stretch has nothing else.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from curation.errors import UserError
from training.regions import NONE


class Budget:
    """Bounds the share of holes over the last `over` samples, seen where the loop looks at the counts."""

    def __init__(self, rate: float, over: int) -> None:
        self.rate, self.over = rate, over
        self._past: deque[tuple[int, dict[str, int]]] = deque([(0, {})])

    def state(self) -> list[tuple[int, dict[str, int]]]:
        """What a checkpoint keeps, so that a resumed run goes on with the same past; one entry for each look within
        `over` samples."""
        return list(self._past)

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from what `state` gave."""
        self._past = deque((drawn, dict(holes)) for drawn, holes in state)

    def check(self, drawn: int, holes: Mapping[str, int]) -> None:
        """drawn: samples of the run so far, over all ranks and resumes · holes: by reason, of these.

        Raises:
            UserError: too many, with their reasons.
        """
        while len(self._past) > 1 and self._past[1][0] <= drawn - self.over:
            self._past.popleft()
        since, before = self._past[0]
        new = {reason: n - before.get(reason, 0) for reason, n in holes.items() if n > before.get(reason, 0)}
        if not self.over <= drawn - since <= new.get(NONE, 0):
            new.pop(NONE, None)
        if sum(new.values()) > max(self.rate * (drawn - since), bool(self.rate)):
            said = ", ".join(f"{reason} {n}" for reason, n in sorted(new.items(), key=lambda item: -item[1]))
            raise UserError(
                f"loader.max_error_rate: {sum(new.values())} of the last {drawn - since} samples could not be read "
                f"({said}); look at the shards or raise it"
            )
        self._past.append((drawn, dict(holes)))
