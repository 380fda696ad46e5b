"""Runs a recipe's selectors over the parts of the pool and keeps count.

Selectors act in the recipe's order. What a part's rows have failed is one bit a
selector; between the rounds that is all that is held of the pool. All work on
columns goes through `map_parts`, which may be the builtin `map` or Ray's.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.selection.interface import Selector

MapParts = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""`map_parts(function, items)`: the function's results in the order of the items."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parquet file of the signal store and the place of its first row in the pool."""

    path: Path
    first: int
    rows: int


@dataclass(kw_only=True)
class Selection:
    """What came out. `failed`[part] is bool [rows, selectors]; `valid`[part] is False for rows with an error."""

    valid: list[np.ndarray]
    failed: list[np.ndarray]
    stages: list[dict[str, Any]] = field(default_factory=list)


def run(selectors: Mapping[str, Selector], parts: Sequence[Part], map_parts: MapParts = map) -> Selection:
    """Apply the selectors in order; `stages` has {name, in, out, dropped, would_drop, ..., wall_s} for each."""
    valid = list(map_parts(_valid, parts))
    failed = [np.zeros((part.rows, len(selectors)), bool) for part in parts]
    result = Selection(valid=valid, failed=failed)
    for number, (name, selector) in enumerate(selectors.items()):
        began = time.perf_counter()
        alive = [v & ~f.any(axis=1) for v, f in zip(valid, failed, strict=True)]
        scope = alive if selector.scope == "survivors" else valid
        work = list(zip(parts, scope, strict=True))
        decision = None
        for one in selector.passes():
            summaries = list(map_parts(partial(_local, selector, one.local, decision), work))
            decision = one.decide(summaries, decision)
        would = 0
        for i, keep in enumerate(map_parts(partial(_apply, selector, decision), work)):
            failed[i][scope[i], number] = ~keep
            would += int((~keep).sum())
        before = sum(int(a.sum()) for a in alive)
        dropped = sum(int((a & f[:, number]).sum()) for a, f in zip(alive, failed, strict=True))
        stage = {"name": name, "in": before, "out": before - dropped, "dropped": dropped, "would_drop": would}
        result.stages.append({**stage, **selector.describe(decision), "wall_s": round(time.perf_counter() - began, 3)})
    return result


def _valid(part: Part) -> np.ndarray:
    return pq.read_table(part.path, columns=["error"])["error"].is_null().to_numpy()


def _table(selector: Selector, part: Part, scope: np.ndarray) -> pa.Table:
    table = pq.read_table(part.path, columns=list(dict.fromkeys(selector.needs)))
    table = table.append_column("row", pa.array(np.arange(part.first, part.first + part.rows)))
    return table.filter(pa.array(scope))


def _local(
    selector: Selector, local: Callable[[pa.Table, Any], Any], decision: Any, item: tuple[Part, np.ndarray]
) -> Any:
    return local(_table(selector, *item), decision)


def _apply(selector: Selector, decision: Any, item: tuple[Part, np.ndarray]) -> np.ndarray:
    return selector.apply(_table(selector, *item), decision)
