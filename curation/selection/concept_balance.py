"""Flatten the concepts: thin out captions of frequent entries and keep those of rare ones, as MetaCLIP does.

An entry that `count` captions name lets each of them through with probability
min(1, t / count); a caption stays when any of its entries lets it through, and
one without entries goes (Xu et al., "Demystifying CLIP Data", arXiv 2309.16671).
The threshold t divides the head from the tail, and the share of all matches
that the tail has is what MetaCLIP 2 (arXiv 2507.22062) carries over from
English to other languages, each with its own counts and so its own t.

First the pool is counted, then what is left of the most frequent entries. One
hash(seed, uid) a caption against 1 - prod(1 - p) has the same probability as one
draw an entry, and depends on neither order nor partition.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.hashing import uniform_many
from curation.selection.interface import Fold, Program

TOP = 20  # entries that the description shows
PAIRS = pa.schema([("language", pa.string()), ("entry", pa.int32()), ("count_all", pa.int64())])
ALL = "all"  # what stands for the language where languages are not told apart


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What was decided. G languages (or one group), E pairs of language and entry, sorted by `keys`."""

    languages: list[str]
    t_g: np.ndarray  # int64 [G]
    keys: np.ndarray  # int64 [E]: place of the language << 32 | entry
    counts: np.ndarray  # int64 [E]: captions that name the entry
    probability: np.ndarray  # float64 [E]
    top: np.ndarray  # int64 [<= TOP]: places in `keys` of the most frequent
    after: np.ndarray  # int64 [<= TOP]: how many of their captions stay


@dataclass(frozen=True, kw_only=True)
class ConceptBalance:
    """Balance survivors over the entries in `column`, which a signal of kind `concepts` makes. Set one threshold:

    `t`: a count (20,000 for MetaCLIP-400M of 1.6 billion pairs, 170,000 for 2.5B).
    `tail_share`: this share of the matches is in the tail; t is the count at which the share comes nearest.
    `per_language`: counts and t for each value of the column `language`; with `t` given, it is that of
    `reference_language`, and the others have the t at which their tail share comes nearest to that language's.
    """

    column: str = "concepts"
    t: int | None = None
    tail_share: float | None = None
    per_language: bool = False
    reference_language: str = "en"
    seed: int = 0
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if (self.t is None) == (self.tail_share is None):
            raise UserError("concept_balance: set exactly one of t and tail_share")
        if self.t is not None and self.t < 1:
            raise UserError(f"concept_balance: t {self.t} is not at least 1")
        if self.tail_share is not None and not 0 < self.tail_share <= 1:
            raise UserError(f"concept_balance: tail_share {self.tail_share} is not in (0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column, "uid", "language") if self.per_language else (self.column, "uid")

    def decide(self) -> Program:
        """A `Balance`."""
        pairs = yield Fold(self._count, _added)
        balance = self._thresholds(pairs)
        after = yield Fold(partial(self._kept, balance), np.add)
        return balance if after is None else replace(balance, after=after)

    def _count(self, table: pa.Table) -> pa.Table:
        """(language string, entry int32, count int64), a row for each pair that occurs."""
        rows, entries = self._matches(table)
        pairs = pa.table({"language": self._languages(table).take(pa.array(rows)), "entry": entries})
        return pairs.group_by(["language", "entry"]).aggregate([([], "count_all")])

    def _thresholds(self, pairs: pa.Table | None) -> Balance:
        if pairs is None:
            pairs = PAIRS.empty_table()
        pairs = pairs.sort_by([("language", "ascending"), ("entry", "ascending")])
        languages = sorted(pairs["language"].unique().to_pylist())
        group = pc.index_in(pairs["language"], value_set=pa.array(languages, pa.string())).to_numpy().astype(np.int64)
        counts = pairs["count_all"].to_numpy()
        t_g = self._t_of_each(languages, np.split(counts, np.flatnonzero(np.diff(group)) + 1))
        top = np.argsort(-counts, kind="stable")[:TOP]
        return Balance(
            languages=languages,
            t_g=t_g,
            keys=group << 32 | pairs["entry"].to_numpy(),
            counts=counts,
            probability=np.minimum(1.0, t_g[group] / counts),
            top=top,
            after=np.zeros(len(top), np.int64),
        )

    def _t_of_each(self, languages: list[str], counts_of: list[np.ndarray]) -> np.ndarray:
        """int64 [G]"""
        if not languages:  # nothing matched anything
            return np.zeros(0, np.int64)
        if self.t is None:
            return np.array([share_to_t(counts, self.tail_share or 0.0) for counts in counts_of])
        if not self.per_language:
            return np.array([self.t])
        if self.reference_language not in languages:
            raise UserError(
                f"concept_balance: reference_language {self.reference_language}: no survivor's caption in it names a "
                f"concept; name one of {', '.join(filter(None, languages))}, or set tail_share in place of t"
            )
        reference = languages.index(self.reference_language)
        share = t_to_share(counts_of[reference], self.t)
        t_g = np.array([share_to_t(counts, share) for counts in counts_of])
        t_g[reference] = self.t
        return t_g

    def _kept(self, balance: Balance, table: pa.Table) -> np.ndarray:
        """How many captions of each top entry stay: int64 [<= TOP]."""
        rows, places = self._places(table, balance)
        kept = places[self._draw(table, rows, balance.probability[places])[rows]]
        return np.array([(kept == place).sum() for place in balance.top], np.int64)

    def apply(self, table: pa.Table, decision: Balance) -> np.ndarray:
        rows, places = self._places(table, decision)
        return self._draw(table, rows, decision.probability[places])

    def _draw(self, table: pa.Table, rows: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Which rows of the table to keep: bool [R]. `rows` and `probability` are of the matches, [M]."""
        refused = np.ones(table.num_rows)
        np.multiply.at(refused, rows, 1.0 - probability)
        return uniform_many(f"{self.seed}/concept choice", table["uid"].to_pylist()) < 1.0 - refused

    def _places(self, table: pa.Table, balance: Balance) -> tuple[np.ndarray, np.ndarray]:
        """Of each match, its row in the table and its place in `balance.keys`: int64 [M] both."""
        rows, entries = self._matches(table)
        of_row = pc.index_in(self._languages(table), value_set=pa.array(balance.languages, pa.string()))
        # A language whose captions all match nothing is not among the groups, but then none of its rows is in `rows`.
        group = of_row.fill_null(-1).to_numpy().astype(np.int64)
        return rows, np.searchsorted(balance.keys, group[rows] << 32 | entries)

    def _matches(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Of each match, its row in the table int64 [M] and its entry int32 [M]."""
        lists = table[self.column].combine_chunks()
        return pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists).to_numpy()

    def _languages(self, table: pa.Table) -> pa.Array:
        """The group of each row: string [R]."""
        if not self.per_language:
            return pa.repeat(ALL, table.num_rows)
        return pc.fill_null(table["language"].combine_chunks(), "")  # a column of the pool's own may lack it

    def describe(self, decision: Balance) -> dict[str, Any]:
        """Of each language, or of "all": t and what was counted. Of the top entries: how many captions stay."""
        group = decision.keys >> 32
        groups = {}
        for g, (language, t) in enumerate(zip(decision.languages, decision.t_g.tolist(), strict=True)):
            counts = decision.counts[group == g]
            groups[language] = {
                "t": t,
                "entries": len(counts),
                "matches": int(counts.sum()),
                "tail_share": t_to_share(counts, t),
            }
        before, entries = decision.counts[decision.top], decision.keys[decision.top] & 0xFFFFFFFF
        top = [  # [language, entry, before, after]
            [decision.languages[g], e, b, a]
            for g, e, b, a in zip(group[decision.top], entries.tolist(), before.tolist(), decision.after.tolist())
        ]
        return {"concepts": {"groups": groups, "top": top}}


def _added(a: pa.Table, b: pa.Table) -> pa.Table:
    both = pa.concat_tables([a, b]).group_by(["language", "entry"]).aggregate([("count_all", "sum")])
    return both.rename_columns(["language", "entry", "count_all"])


def t_to_share(counts: np.ndarray, t: int) -> float:
    """The share of all matches that entries with fewer than t have. `counts`: int64 [E], none of them 0."""
    return float(counts[counts < t].sum() / counts.sum())


def share_to_t(counts: np.ndarray, share: float) -> int:
    """The count at which the ascending running share of the matches comes nearest to `share`: MetaCLIP 2's `p_to_t`.

    There the entries that nothing matches are in the list too, and a share that
    is nearer to 0 than to that of the rarest entry gives t = 0, which drops the
    language whole; here it gives the rarest entry's count.
    """
    ascending = np.sort(counts)
    running = np.cumsum(ascending) / ascending.sum()
    return int(ascending[np.abs(running - share).argmin()])
