"""Keep what at least one of several selectors keeps: DataComp's "or" of filters.

"And" needs no kind, since a recipe's selectors all have to pass. The inner
selectors see the whole pool, each as if it stood alone, so that the order in
which they are written means nothing; those that depend on what is left by
others are refused.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import config_hash
from curation.selection.interface import Fold, Program


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

    def decide(self) -> Program:
        """{"of": {name: what that selector decides}, "keeps": rows of the pool that each keeps int64 [selectors]}"""
        decisions = {}
        for name, selector in self.selectors.items():
            decision = selector.decide() if hasattr(selector, "decide") else None
            decisions[name] = (yield from decision) if isinstance(decision, Generator) else decision
        return {"of": decisions, "keeps": (yield Fold(partial(self._count, decisions), np.add))}

    def _count(self, decisions: dict[str, Any], table: pa.Table) -> np.ndarray:
        return self._keeps(decisions, table).sum(axis=1)

    def _keeps(self, decisions: dict[str, Any], table: pa.Table) -> np.ndarray:
        """bool [selectors, rows]"""
        return np.stack([s.apply(table, decisions[name]) for name, s in self.selectors.items()])

    def apply(self, table: pa.Table, decisions: dict[str, Any]) -> np.ndarray:
        return np.any(self._keeps(decisions["of"], table), axis=0)

    def describe(self, decisions: dict[str, Any]) -> dict[str, Any]:
        """{"any_of": {name: {"keeps": rows of the pool, what it says}}, "thresholds": those of all}"""
        keeps = np.zeros(len(self.selectors), int) if decisions["keeps"] is None else decisions["keeps"]
        said = {
            name: {"keeps": int(n), **s.describe(decisions["of"][name])}
            for (name, s), n in zip(self.selectors.items(), keeps, strict=True)
        }
        thresholds: dict[str, list[float]] = {}
        for one in said.values():
            for column, bounds in one.get("thresholds", {}).items():
                thresholds[column] = [*thresholds.get(column, []), *bounds]
        return {"any_of": said, "thresholds": thresholds}
