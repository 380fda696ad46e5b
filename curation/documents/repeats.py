"""What only the whole pool can tell: pictures that are everywhere, documents and paragraphs that come again.

The steps and their order are those of OBELICS' released code (build_obelics 06 to
11): pictures in too many documents, documents with one address, paragraphs that
repeat within a domain, documents that are left without text or picture, documents
with the same set of pictures. Each step sees what the ones before it left. OBELICS
counts pictures by address and keeps the latest crawl of a page; here pictures count
by their bytes, and the first document by hash(seed, uid) stays.

Everything is arrays of 64-bit hashes, 18 bytes an item and 33 a document in the
driver, with no text and no picture among them; sums of hashes stand for sets.
"""

from dataclasses import dataclass

import numpy as np

from curation.documents.config import PoolRules

PICTURE_STAGE = "image_everywhere"
PARAGRAPH_STAGE = "paragraph_repeated"
DOCUMENT_STAGES = ("duplicate_document", "duplicate_url", "no_text", "no_image", "duplicate_image_set")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A part, or the pool, after the rules that look at one document: hashes, and what is still in.

    D documents: uid, order (hash(seed, uid)), url (0: none), domain, all uint64 [D]; kept bool [D].
    I items, those of a document together: document int64 [I]; picture bool [I]; digest uint64 [I]; kept bool [I].
    """

    uid: np.ndarray
    order: np.ndarray
    url: np.ndarray
    domain: np.ndarray
    kept: np.ndarray
    document: np.ndarray
    picture: np.ndarray
    digest: np.ndarray
    item_kept: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What goes by the pool's rules: for each document the number of its stage in DOCUMENT_STAGES or -1 (int8 [D]);
    for each item whether it repeats (bool [I])."""

    document: np.ndarray
    item: np.ndarray


def joined(parts: list[Judged]) -> Judged:
    """Parts one after the other, as one pool."""
    firsts = np.cumsum([0, *(len(part.uid) for part in parts)])
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Judged.__dataclass_fields__
        if name != "document"
    }
    return Judged(document=np.concatenate([p.document + f for p, f in zip(parts, firsts, strict=False)]), **columns)


def find_repeats(pool: Judged, rules: PoolRules) -> Repeats:
    """Apply the pool's rules, step by step."""
    stage = np.full(len(pool.uid), -1, np.int8)
    alive = pool.kept.copy()
    left = pool.item_kept & alive[pool.document]
    repeated = np.zeros(len(pool.digest), bool)

    def drop(items: np.ndarray) -> None:
        repeated[items] = True
        left[items] = False

    def drop_documents(name: str, which: np.ndarray) -> None:
        stage[which] = DOCUMENT_STAGES.index(name)
        alive[which] = False
        left[:] &= alive[pool.document]

    if rules.max_image_documents is not None:
        items = np.flatnonzero(left & pool.picture)
        document, digest = _pairs(pool, items)
        seen, counts = np.unique(digest, return_counts=True)
        drop(items[np.isin(pool.digest[items], seen[counts > rules.max_image_documents])])
    drop_documents("duplicate_document", _later(pool.uid, pool.order, np.flatnonzero(alive)))
    if rules.one_per_url:
        drop_documents("duplicate_url", _later(pool.url, pool.order, np.flatnonzero(alive & (pool.url != 0))))
    if rules.repeated_paragraphs:
        items = np.flatnonzero(left & ~pool.picture)
        place = _mixed(_mixed(pool.domain[pool.document[items]]) ^ pool.digest[items])
        _, where, counts = np.unique(place, return_inverse=True, return_counts=True)
        drop(items[counts[where] > 1])
    for name, wanted in (("no_text", ~pool.picture), ("no_image", pool.picture)):
        found = np.bincount(pool.document[left & wanted], minlength=len(alive)) > 0
        drop_documents(name, np.flatnonzero(alive & ~found))
    if rules.one_per_image_set:
        document, digest = _pairs(pool, np.flatnonzero(left & pool.picture))
        sets = np.zeros(len(alive), np.uint64)
        np.add.at(sets, document, _mixed(digest))
        drop_documents("duplicate_image_set", _later(sets, pool.order, np.flatnonzero(alive)))
    return Repeats(document=stage, item=repeated)


def _pairs(pool: Judged, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(document, digest) of these items, each pair once."""
    order = np.lexsort((pool.digest[items], pool.document[items]))
    document, digest = pool.document[items][order], pool.digest[items][order]
    new = np.ones(len(order), bool)
    new[1:] = (document[1:] != document[:-1]) | (digest[1:] != digest[:-1])
    return document[new], digest[new]


def _later(key: np.ndarray, order: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Of these documents, those whose key an earlier one has, by `order` and then by place."""
    ranked = documents[np.lexsort((documents, order[documents], key[documents]))]
    again = np.zeros(len(ranked), bool)
    again[1:] = key[ranked][1:] == key[ranked][:-1]
    return ranked[again]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit values so that sums and xors of them do not meet by structure (the finaliser of splitmix64)."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
