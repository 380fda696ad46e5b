"""Selectors joined: `any_of` keeps what one of several keeps, as DataComp's "or" of filters, `all_of` what all keep.

A recipe's own selectors all have to pass, so `all_of` is for the inside of an
`any_of`, and the other way about: "on the list, or English and of a high score".
The inner selectors see the whole pool, each as if it stood alone, so that the
order in which they are written means nothing; those that depend on what is left
by others are refused.

Each says of a row how often it is kept: 0 or 1, or what a list with repeats asks
for. A union keeps it as often as the one that keeps it most often; an
intersection by the product, as selectors one after the other do.
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
class Joined:
    """`selectors`: name -> {kind, its settings}, as in a recipe; here they are `Selector`s that look at any row."""

    selectors: dict[str, Any]
    kind: ClassVar[str]
    join: ClassVar[np.ufunc]  # of how often two of them keep a row
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        if not self.selectors:
            raise UserError(f"{self.kind}: selectors is empty; name at least one")
        for name, selector in self.selectors.items():
            if selector.scope == "survivors" and not getattr(selector, "by_row", False):
                raise UserError(
                    f"{self.kind}: selectors.{name} compares what others left and cannot be one of several; "
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
        return np.count_nonzero(self._often(decisions, table), axis=1)

    def _often(self, decisions: dict[str, Any], table: pa.Table) -> np.ndarray:
        """bool or int32 [selectors, rows]"""
        return np.stack([s.apply(table, decisions[name]) for name, s in self.selectors.items()])

    def apply(self, table: pa.Table, decisions: dict[str, Any]) -> np.ndarray:
        often = self._often(decisions["of"], table)
        return self.join.reduce(often, axis=0, dtype=often.dtype)

    def describe(self, decisions: dict[str, Any]) -> dict[str, Any]:
        """{kind: {name: {"keeps": rows of the pool, what it says}}, "thresholds": those of all}"""
        keeps = np.zeros(len(self.selectors), int) if decisions["keeps"] is None else decisions["keeps"]
        said = {
            name: {"keeps": int(n), **s.describe(decisions["of"][name])}
            for (name, s), n in zip(self.selectors.items(), keeps, strict=True)
        }
        thresholds: dict[str, list[float]] = {}
        for one in said.values():
            for column, bounds in one.get("thresholds", {}).items():
                thresholds[column] = [*thresholds.get(column, []), *bounds]
        return {self.kind: said, "thresholds": thresholds}


class AnyOf(Joined):
    """Keep what at least one of `selectors` keeps."""

    kind = "any_of"
    join = np.maximum


class AllOf(Joined):
    """Keep what every one of `selectors` keeps."""

    kind = "all_of"
    join = np.multiply
