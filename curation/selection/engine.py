"""Runs a recipe's selectors over the partitions of the pool and keeps count.

Selectors act in the recipe's order. All work on columns is done in rounds over
the partitions, through `map_parts`, which may be the builtin `map` or Ray's. A
round reads each partition once: it lets those selectors act whose decisions
have been made, and answers the next question of the one that is deciding. What
the rows have failed so far lies beside the pool in one small file a partition,
a new one where a round changes it, so that a round can be done again; the
driver holds counts and decisions alone.
"""

import itertools
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.selection.interface import Apart, Count, Fold, Leaving, Program, Selector, Shuffle, Warn, among
from curation.shuffle import MapParts, buckets_for, gather, scatter

PARTITION_ROWS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A parquet file of the signal store and the place of its first row in the pool."""

    path: Path
    first: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Parts that follow one another and are worked on together."""

    number: int
    parts: tuple[Part, ...]

    @property
    def first(self) -> int:
        return self.parts[0].first

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables(read_columns(part.path, columns) for part in self.parts)


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Of one small file of many: `pq.read_table` takes longer to look at it than to read it."""
    return pq.ParquetFile(path, pre_buffer=False).read(list(columns), use_threads=False)


def partitions(parts: Sequence[Part], rows: int = PARTITION_ROWS) -> list[Partition]:
    """The parts in partitions that begin in the same stretch of so many rows."""
    groups = itertools.groupby(parts, key=lambda part: part.first // rows)
    return [Partition(number=number, parts=tuple(group)) for number, (_, group) in enumerate(groups)]


@dataclass(kw_only=True)
class State:
    """The verdicts on the rows of a partition so far."""

    valid: np.ndarray  # bool [rows]: False for rows with an error
    failed: np.ndarray  # bool [rows, selectors], a column in one piece
    copies: np.ndarray  # int32 [rows]: how often each row would be kept, whatever it failed
    left: dict[str, np.ndarray] = field(default_factory=dict)  # columns that a deciding selector left, [rows]

    def rows(self, start: int, end: int) -> "State":
        return State(valid=self.valid[start:end], failed=self.failed[start:end], copies=self.copies[start:end])

    def alive(self) -> np.ndarray:
        """Which rows nothing has dropped: bool [rows]."""
        alive = self.valid.copy()
        for failed in self.failed.T:
            alive &= ~failed
        return alive


@dataclass(kw_only=True)
class Selection:
    """What came out: where the last states lie, and for each selector {name, in, out, dropped, would_drop, ...}."""

    folder: Path
    version: int = 0
    selectors: int
    stages: list[dict[str, Any]] = field(default_factory=list)

    def state(self, partition: Partition) -> State:
        if not self.version:
            return _begun(partition.read(["error"])["error"], self.selectors)
        return _load(self.folder, self.version, partition)


def run(
    selectors: Mapping[str, Selector], pool: Sequence[Partition], folder: Path, map_parts: MapParts = map
) -> Selection:
    """Apply the selectors in order. `folder` is for the run's files, and empty; whoever reads the states removes it."""
    return _Engine(selectors, pool, folder, map_parts).run()


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """A selector that has decided: its place in the recipe and what it decided."""

    number: int
    selector: Selector
    decision: Any


class _Engine:
    def __init__(
        self, selectors: Mapping[str, Selector], pool: Sequence[Partition], folder: Path, map_parts: MapParts
    ) -> None:
        self._selectors, self._pool, self._folder, self._map = selectors, pool, folder, map_parts
        self._result = Selection(folder=folder, selectors=len(selectors))
        self._decided: list[_Verdict] = []  # those that have not acted yet
        self._shuffles: list[Path] = []
        self._counted: tuple[Selector | None, int] = (None, 0)  # what the last round said of a selector's scope
        self._warned: dict[int, list[str]] = {}  # by the place of the selector
        self._deciding = 0  # the place of the selector that is deciding, or of the last one
        self._began = time.perf_counter()

    def run(self) -> Selection:
        for number, selector in enumerate(self._selectors.values()):
            self._deciding = number
            decision: Any = getattr(selector, "decide", lambda: None)()
            if isinstance(decision, Generator):
                decision = self._drive(selector, decision)
            self._decided.append(_Verdict(number=number, selector=selector, decision=decision))
        if self._decided:
            self._round(None, None)
        for shuffled in self._shuffles:
            shutil.rmtree(shuffled, ignore_errors=True)
        return self._result

    def _drive(self, selector: Selector, program: Program) -> Any:
        answer: Any = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(request, Warn):
                self._warn(self._deciding, request.text)
                answer = None
            else:
                answer = self._answer(selector, request)

    def _answer(self, selector: Selector, request: Count | Fold | Shuffle | Apart) -> Any:
        if isinstance(request, Apart):
            return next(iter(self._map(partial(_called, self._folder), [request.work])))
        if isinstance(request, Count):
            return self._round(selector, None)[0]
        if isinstance(request, Fold):
            return self._round(selector, request)[1]
        rows, _ = self._round(selector, None)
        buckets = request.buckets or buckets_for(rows * request.spread, request.row_bytes)
        shuffled = self._folder / f"shuffle-{len(self._shuffles)}"
        self._shuffles.append(shuffled)
        self._round(selector, request, shuffled, buckets)
        return gather(shuffled, len(self._pool), buckets, request.row_bytes, request.reduce, self._map)

    def _round(
        self, asking: Selector | None, request: Fold | Shuffle | None, shuffled: Path | None = None, buckets: int = 0
    ) -> tuple[int, Any]:
        """Let the decided act and answer the request: (rows in the asking selector's scope, the merged summary)."""
        if request is None and not self._decided and asking is not None and self._counted[0] is asking:
            return self._counted[1], None
        names = list(self._selectors)
        task = _Round(
            folder=self._folder, version=self._result.version, selectors=len(self._selectors),
            decided=tuple(self._decided), asking=asking, request=request, shuffled=shuffled, buckets=buckets,
            label=f"select {names[self._deciding]}",
        )  # fmt: skip
        counts = np.zeros((len(self._decided), 3), np.int64)
        rows, merged, changed = 0, None, False
        for n, done in enumerate(self._map(task, self._pool)):
            counts += done.counts
            rows += done.rows
            changed |= done.changed
            if isinstance(request, Fold):
                merged = done.summary if n == 0 else request.merge(merged, done.summary)
        # Selectors that act in one round share its time, and what the deciding one asked before is its own.
        spent = (time.perf_counter() - self._began) / max(len(self._decided), 1)
        for verdict, (before, dropped, would) in zip(self._decided, counts.tolist(), strict=True):
            stage = {"name": names[verdict.number], "in": before, "out": before - dropped, "dropped": dropped}
            if before and dropped == before:
                self._warn(verdict.number, f"keeps none of the {before:,} samples that are left; check its settings")
            if verdict.number in self._warned:
                stage["warnings"] = self._warned[verdict.number]
            said = verdict.selector.describe(verdict.decision)
            self._result.stages.append({**stage, "would_drop": would, **said, "wall_s": round(spent, 3)})
        if self._decided:
            self._began = time.perf_counter()
        self._decided = []
        if changed:
            for old in self._folder.glob(f"state-{self._result.version}-*"):
                old.unlink()
            self._result.version += 1
        self._counted = (asking, rows)
        return rows, merged

    def _warn(self, number: int, text: str) -> None:
        self._warned.setdefault(number, []).append(text)
        print(f"selectors.{list(self._selectors)[number]}: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class _Done:
    counts: np.ndarray  # int64 [decided, 3]: rows before, dropped, would drop
    rows: int
    summary: Any
    changed: bool


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What a worker is told; called with a partition, it does the round there."""

    folder: Path
    version: int
    selectors: int
    decided: tuple[_Verdict, ...]
    asking: Selector | None
    request: Fold | Shuffle | None
    shuffled: Path | None
    buckets: int
    label: str  # what a progress bar calls it

    def __call__(self, partition: Partition) -> _Done:
        state = _load(self.folder, self.version, partition) if self.version else None
        acting = [v for v in self.decided if hasattr(v.selector, "apply")]
        asked = self._asked(state)
        first = () if state else ("error",)
        table = partition.read(list(dict.fromkeys([*(c for v in acting for c in v.selector.needs), *asked, *first])))
        state = state or _begun(table["error"], self.selectors)
        row = pa.array(np.arange(partition.first, partition.first + len(state.valid)))
        table = table.append_column("row", row) if table.num_columns else pa.table({"row": row})
        counts, alive = [], state.alive()
        for verdict in self.decided:
            counts.append(self._act(verdict, table, state, alive))
            alive &= ~state.failed[:, verdict.number]
        if self.decided:
            state.left = {}
        summary, left = None, False
        scope = alive if self.asking is not None and self.asking.scope == "survivors" else state.valid
        if self.request is not None:
            for name, values in state.left.items():
                table = table.append_column(name, pa.array(values))
            inner = _in_scope(table, [*asked, *state.left], scope)
            if isinstance(self.request, Fold):
                summary = self.request.local(inner)
            else:
                assert self.shuffled is not None
                scatter(self.shuffled, partition.number, [self.request.rows(inner, self.buckets)], self.buckets)
            if isinstance(summary, Leaving):
                left = True
                for name, values in summary.columns.items():
                    state.left[name] = np.zeros(len(scope), values.dtype)
                    state.left[name][scope] = values
                summary = summary.summary
        changed = bool(self.decided) or left
        if changed:
            _save(self.folder, self.version + 1, partition, state)
        rows = int(np.count_nonzero(scope))
        return _Done(counts=np.array(counts, np.int64).reshape(-1, 3), rows=rows, summary=summary, changed=changed)

    def _asked(self, state: State | None) -> list[str]:
        if self.request is None or self.asking is None:
            return []
        columns = self.asking.needs if self.request.columns is None else self.request.columns
        left = state.left if state else {}
        return [column for column in dict.fromkeys(columns) if column not in left]

    def _act(self, verdict: _Verdict, table: pa.Table, state: State, alive: np.ndarray) -> tuple[int, ...]:
        """Mark what the selector drops, of rows of which these are `alive`: (rows before, dropped, would drop)."""
        selector = verdict.selector
        scope = alive if selector.scope == "survivors" else state.valid
        if hasattr(selector, "apply"):
            kept = selector.apply(_in_scope(table, selector.needs, scope), verdict.decision)
        else:
            kept = ~among(_in_scope(table, (), scope)["row"].to_numpy(), verdict.decision["dropped"])
        if kept.dtype != bool:
            state.copies[scope] *= np.maximum(kept, 1).astype(np.int32)
        gone = state.failed[:, verdict.number]
        gone[scope] = kept == 0
        return tuple(int(np.count_nonzero(rows)) for rows in (alive, alive & gone, gone))


def _called(folder: Path, work: Callable[[Path], Any]) -> Any:
    return work(folder)


def _in_scope(table: pa.Table, columns: Sequence[str], scope: np.ndarray) -> pa.Table:
    """These columns and `row`, of the rows in scope."""
    chosen = table.select(list(dict.fromkeys([*columns, "row"])))
    return chosen if scope.all() else chosen.filter(pa.array(scope))


def _path(folder: Path, version: int, partition: Partition) -> Path:
    return folder / f"state-{version}-{partition.number:06d}.npy"


def _begun(errors: pa.ChunkedArray, selectors: int) -> State:
    rows = len(errors)
    failed = np.zeros((rows, selectors), bool, order="F")
    return State(valid=errors.is_null().to_numpy(), failed=failed, copies=np.ones(rows, np.int32))


def _load(folder: Path, version: int, partition: Partition) -> State:
    with open(_path(folder, version, partition), "rb") as file:
        fields = {name: np.load(file) for name in np.load(file).tolist()}
    base = {name: fields.pop(name) for name in ("valid", "failed", "copies")}
    return State(**base, left=fields)


def _save(folder: Path, version: int, partition: Partition, state: State) -> None:
    """One array after the other, their names first: a zip, as `np.savez` makes it, costs more than the selectors."""
    path = _path(folder, version, partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.npy")
    columns = {"valid": state.valid, "failed": state.failed, "copies": state.copies, **state.left}
    with open(temporary, "wb") as file:
        np.save(file, np.array(list(columns)))
        for values in columns.values():
            np.save(file, values)
    os.replace(temporary, path)
