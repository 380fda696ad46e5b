"""Keep what at least one of several selectors keeps: DataComp's "or" of filters.

"And" needs no kind, since a recipe's selectors all have to pass. The inner
selectors see the whole pool, each as if it stood alone, so that the order in
which they are written means nothing; those that depend on what is left by
others are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import config_hash
from curation.selection.interface import Pass

KEEPS = ("keeps",)  # no selector's name, since those are strings


@dataclass(frozen=True, kw_only=True)
class AnyOf:
    """`selectors`: name -> {kind, its settings}, as in a recipe; here they are `Selector`s of scope "pool"."""

    selectors: dict[str, Any]
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not self.selectors:
            raise UserError("any_of: selectors is empty; name at least one")
        for name, selector in self.selectors.items():
            if selector.scope == "survivors":
                raise UserError(
                    f"any_of: selectors.{name} compares what others left and cannot be one of several; "
                    "move it to the recipe's own selectors"
                )

    def content(self) -> str:
        """What the inner selectors read beside the pool."""
        return config_hash({name: s.content() for name, s in self.selectors.items() if hasattr(s, "content")})

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for s in self.selectors.values() for column in s.needs))

    def passes(self) -> Sequence[Pass]:
        """The passes of one selector after those of another, and one that counts what each keeps.

        The decision is {name: its own so far}, and at last {KEEPS: [of each]} beside them.
        """
        inner = [
            Pass(partial(self._local, name, one), partial(self._decide, name, one))
            for name, selector in self.selectors.items()
            for one in selector.passes()
        ]
        return [*inner, Pass(self._count, self._add)]

    def _local(self, name: str, one: Pass, table: pa.Table, decisions: dict[str, Any] | None) -> Any:
        return one.local(table, (decisions or {}).get(name))

    def _decide(self, name: str, one: Pass, summaries: list[Any], decisions: dict[str, Any] | None) -> dict[str, Any]:
        so_far = decisions or {}
        return {**so_far, name: one.decide(summaries, so_far.get(name))}

    def _count(self, table: pa.Table, decisions: dict[str, Any] | None) -> np.ndarray:
        return self._keeps(table, decisions or {}).sum(axis=1)

    def _add(self, summaries: list[np.ndarray], decisions: dict[Any, Any] | None) -> dict[Any, Any]:
        return {**(decisions or {}), KEEPS: np.sum(summaries, axis=0).tolist()}

    def _keeps(self, table: pa.Table, decisions: dict[str, Any]) -> np.ndarray:
        """bool [selectors, rows]"""
        return np.stack([s.apply(table, decisions.get(name)) for name, s in self.selectors.items()])

    def apply(self, table: pa.Table, decisions: dict[str, Any]) -> np.ndarray:
        return np.any(self._keeps(table, decisions), axis=0)

    def describe(self, decisions: dict[Any, Any]) -> dict[str, Any]:
        """{"any_of": {name: {"keeps": rows of the pool, what it says}}, "thresholds": those of all}"""
        said = {
            name: {"keeps": keeps, **s.describe(decisions.get(name))}
            for (name, s), keeps in zip(self.selectors.items(), decisions[KEEPS], strict=True)
        }
        thresholds: dict[str, list[float]] = {}
        for one in said.values():
            for column, bounds in one.get("thresholds", {}).items():
                thresholds[column] = [*thresholds.get(column, []), *bounds]
        return {"any_of": said, "thresholds": thresholds}
