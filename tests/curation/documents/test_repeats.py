"""The pool's rules against the same rules written with sets and loops, on small random pools."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.documents.config import PoolRules
from curation.documents.repeats import DOCUMENT_STAGES, Judged, find_repeats, joined


@dataclass(frozen=True)
class Doc:
    uid: int
    url: int
    domain: int
    kept: bool
    items: tuple[tuple[bool, int, bool], ...]  # (picture, digest, kept)


ITEM = st.tuples(st.booleans(), st.integers(1, 6), st.sampled_from([True, True, True, False]))
DOC = st.builds(
    Doc,
    uid=st.integers(0, 12),
    url=st.integers(0, 4),
    domain=st.integers(0, 2),
    kept=st.sampled_from([True, True, True, False]),
    items=st.lists(ITEM, max_size=5).map(tuple),
)
RULES = st.builds(
    PoolRules,
    max_image_documents=st.sampled_from([None, 1, 2]),
    one_per_url=st.booleans(),
    repeated_paragraphs=st.booleans(),
    one_per_image_set=st.booleans(),
)


def order_of(doc: Doc) -> int:
    return (doc.uid * 7919) % 13  # any function of the uid


def as_arrays(docs: list[Doc]) -> Judged:
    flat = [(i, *item) for i, doc in enumerate(docs) for item in doc.items]
    u64 = [np.array(values, np.uint64) for values in zip(*[(d.uid, order_of(d), d.url, d.domain) for d in docs])]
    uid, order, url, domain = u64 if docs else [np.zeros(0, np.uint64)] * 4
    return Judged(
        uid=uid,
        order=order,
        url=url,
        domain=domain,
        kept=np.array([d.kept for d in docs], bool),
        document=np.array([f[0] for f in flat], np.int64),
        picture=np.array([f[1] for f in flat], bool),
        digest=np.array([f[2] for f in flat], np.uint64),
        item_kept=np.array([f[3] for f in flat], bool),
    )


def plainly(docs: list[Doc], rules: PoolRules) -> tuple[list[str | None], list[list[bool]]]:
    """(stage of each document, repeats of its items)."""
    stage: list[str | None] = [None] * len(docs)
    repeated = [[False] * len(doc.items) for doc in docs]
    alive = {i for i, doc in enumerate(docs) if doc.kept}

    def left(i: int, picture: bool) -> list[int]:
        items = enumerate(docs[i].items)
        return [k for k, (kind, _, kept) in items if kind == picture and kept and not repeated[i][k]]

    def digests(i: int, picture: bool) -> list[int]:
        return [docs[i].items[k][1] for k in left(i, picture)]

    def one_of(name: str, groups: dict[object, list[int]]) -> None:
        for members in groups.values():
            for i in sorted(members, key=lambda i: (order_of(docs[i]), i))[1:]:
                stage[i] = name
                alive.discard(i)

    def grouped(key) -> dict[object, list[int]]:  # type: ignore[no-untyped-def]
        groups: dict[object, list[int]] = {}
        for i in alive:
            groups.setdefault(key(i), []).append(i)
        return groups

    if rules.max_image_documents is not None:
        counts = Counter(digest for i in alive for digest in set(digests(i, True)))
        for i in alive:
            for k in left(i, True):
                repeated[i][k] = counts[docs[i].items[k][1]] > rules.max_image_documents
    one_of("duplicate_document", grouped(lambda i: docs[i].uid))
    if rules.one_per_url:
        one_of("duplicate_url", grouped(lambda i: docs[i].url or ("none", i)))
    if rules.repeated_paragraphs:
        seen = Counter((docs[i].domain, digest) for i in alive for digest in digests(i, False))
        for i in alive:
            for k in left(i, False):
                repeated[i][k] = seen[docs[i].domain, docs[i].items[k][1]] > 1
    for name, picture in (("no_text", False), ("no_image", True)):
        for i in sorted(alive):
            if not left(i, picture):
                stage[i] = name
                alive.discard(i)
    if rules.one_per_image_set:
        one_of("duplicate_image_set", grouped(lambda i: frozenset(digests(i, True))))
    return stage, repeated


@settings(deadline=None, max_examples=400)
@given(st.lists(DOC, max_size=12), RULES)
def test_the_pools_rules(docs: list[Doc], rules: PoolRules) -> None:
    found = find_repeats(as_arrays(docs), rules)
    stage, repeated = plainly(docs, rules)
    assert [DOCUMENT_STAGES[n] if n >= 0 else None for n in found.document] == stage
    assert found.item.tolist() == [flag for flags in repeated for flag in flags]


@settings(deadline=None)
@given(st.lists(DOC, max_size=12), RULES, st.integers(0, 12))
def test_parts_make_no_difference(docs: list[Doc], rules: PoolRules, cut: int) -> None:
    whole = find_repeats(as_arrays(docs), rules)
    parts = find_repeats(joined([as_arrays(docs[:cut]), as_arrays(docs[cut:])]), rules)
    assert whole.document.tolist() == parts.document.tolist() and whole.item.tolist() == parts.item.tolist()


@pytest.mark.parametrize("rules", [PoolRules(), PoolRules(max_image_documents=0, one_per_image_set=True)])
def test_an_empty_pool(rules: PoolRules) -> None:
    assert find_repeats(as_arrays([]), rules).document.tolist() == []
