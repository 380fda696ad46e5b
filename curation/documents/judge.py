"""Verdicts: the rules over one document before the pool is compared, and what is made of it after.

`Judging` applies the rules for pictures, paragraphs and, where nothing is assigned,
whole documents, and leaves hashes for `curation.documents.repeats`. `Finishing` takes
the pool's word, drops what repeats within a document, assigns pictures where the
recipe says so, and writes three tables for its part: the ledger (a verdict for every
document), the items (a verdict for every text and picture), and what is kept, ready
to be built. Both read columns of the store; no picture is opened.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.documents.assign import match
from curation.documents.compose import Kept, compose
from curation.documents.config import DocumentRules, DocumentsConfig
from curation.documents.filters import Lists, load_lists
from curation.documents.measure import items_file, picture_key
from curation.documents.repeats import DOCUMENT_STAGES, PARAGRAPH_STAGE, PICTURE_STAGE, Judged
from curation.documents.words import share_in, words_of
from curation.hashing import hash64, hash64_many
from curation.signals.language import Language, LanguageMeter
from curation.store import write_part

TEXT_REASONS = [
    "words",
    "character_repetition",
    "word_repetition",
    "special_characters",
    "stopwords",
    "flagged_words",
    "punctuation",
    "common_words",
]
DOCUMENT_REASONS = [
    "document_images",
    "document_texts",
    *(f"document_{reason}" for reason in TEXT_REASONS),
    "document_language",
]
LEDGER = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("url", pa.string()),
        ("verdict", pa.string()),  # kept, dropped or error
        ("reason", pa.string()),
        ("texts", pa.int32()),  # that are kept
        ("images", pa.int32()),
    ]
)
ITEM_LEDGER = pa.schema(
    [
        ("uid", pa.string()),
        ("index", pa.int32()),  # its place among the items of its document
        ("kind", pa.string()),  # text or image
        ("verdict", pa.string()),  # kept or dropped
        ("reason", pa.string()),
        ("src", pa.string()),
        ("characters", pa.int32()),
    ]
)
OF_DROPPED = "document_dropped"
JUDGED = "judged"


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What the rules over one document say of a part: a reason, or None, for each document and each item."""

    document: list[str | None]
    item: list[str | None]


class Rules:
    """The rules of a recipe with their lists and models, and their verdicts on a part of the store."""

    def __init__(self, config: DocumentsConfig) -> None:
        self.config = config
        self._lists: Lists = load_lists(config.lists)
        self._language: LanguageMeter | None = Language().load("language") if config.document.language else None

    def read(self, path: Path, columns: list[str] | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(documents, items) of a part."""
        return pq.read_table(path).to_pylist(), pq.read_table(items_file(path), columns=columns).to_pylist()

    def verdicts(self, documents: list[dict[str, Any]], items: list[dict[str, Any]]) -> Verdicts:
        of_items = [self._item(item) for item in items]
        of_documents: list[str | None] = []
        at = 0
        for document in documents:
            own = range(at, at := at + document["items"])
            reason = document["error"]
            if reason is None and self.config.assign is None:
                left = [items[i] for i in own if of_items[i] is None]
                texts = [item["text"] for item in left if item["text"] is not None]
                reason = self.document(texts, len(left) - len(texts))
            of_documents.append(reason)
        return Verdicts(document=of_documents, item=of_items)

    def _item(self, item: dict[str, Any]) -> str | None:
        if item["text"] is not None:
            reason = self.config.paragraphs.reason(item["text"], self._lists)
            return reason and f"paragraph_{reason}"
        return item["error"] or self.config.images.reason(
            src=item["src"],
            image_format=item["format"],
            width=item["width"],
            height=item["height"],
            rendered=(item["rendered_width"], item["rendered_height"]),
        )

    def document(self, texts: list[str], images: int) -> str | None:
        """The first rule for documents that what is left of one breaks, or None."""
        rules: DocumentRules = self.config.document
        if not rules.min_images <= images <= rules.max_images:
            return "document_images"
        if not rules.min_texts <= len(texts) <= rules.max_texts:
            return "document_texts"
        text = "\n\n".join(texts)
        if (reason := rules.text.reason(text, self._lists)) is not None:
            return f"document_{reason}"
        if self._language is not None:
            language, probability = self._language.detect(text.lower())  # in lower case, as OBELICS asks its model
            if language != rules.language or probability < rules.min_language_probability:
                return "document_language"
        return None

    def is_boilerplate(self, text: str) -> bool:
        limit = self.config.max_boilerplate_words
        return limit is not None and share_in(words_of(text), self._lists.boilerplate) >= limit


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Sets a worker up; called with (place, part) it gives (place, what the pool must know of it), and leaves the
    verdicts in `folder` for `Finishing`."""

    config: DocumentsConfig
    folder: Path

    def __call__(self) -> Callable[[tuple[int, Path]], tuple[int, Judged]]:
        rules = Rules(self.config)
        return lambda numbered: (numbered[0], judge(rules, self.folder / JUDGED, numbered[1]))


def judge(rules: Rules, folder: Path, part: Path) -> Judged:
    columns = ["text", "src", "rendered_width", "rendered_height", "error", "format", "width", "height", "sha256"]
    documents, items = rules.read(part, columns)
    found = rules.verdicts(documents, items)
    for path, reasons in ((part, found.document), (items_file(part), found.item)):
        write_part(folder / path.name, pa.table({"reason": pa.array(reasons, pa.string())}))
    uids = [document["uid"] for document in documents]
    return Judged(
        uid=hash64_many("uid", uids),
        order=hash64_many(rules.config.seed, uids),
        url=np.array([hash64("url", d["url"]) if d["url"] else 0 for d in documents], np.uint64),
        domain=hash64_many("domain", [d["domain"] for d in documents]),
        kept=np.array([reason is None for reason in found.document], bool),
        document=np.repeat(np.arange(len(documents)), [d["items"] for d in documents]),
        picture=np.array([item["text"] is None for item in items], bool),
        digest=np.array([_digest(item) for item in items], np.uint64),
        item_kept=np.array([reason is None for reason in found.item], bool),
    )


def _digest(item: dict[str, Any]) -> np.uint64:
    if item["text"] is not None:
        return np.uint64(hash64("text", item["text"]))
    return picture_key(item["sha256"] or bytes(8))


@dataclass(frozen=True, kw_only=True)
class Finish:
    """A part with the pool's word on it: stages int8 [D] and repeats bool [I] of `Repeats`; `name` is its files'."""

    part: Path
    name: str
    documents: np.ndarray
    items: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Finishing:
    """Sets a worker up; called with a `Finish` it writes the part's three tables into `folder` and counts them:
    {"documents": {(verdict, reason): n}, "text": ..., "image": ...}."""

    config: DocumentsConfig
    folder: Path

    def __call__(self) -> Callable[[Finish], dict[str, Counter[tuple[str, str | None]]]]:
        rules = Rules(self.config)
        return lambda item: finish(rules, self.folder, item)


def finish(rules: Rules, folder: Path, item: Finish) -> dict[str, Counter[tuple[str, str | None]]]:
    documents, items = rules.read(item.part)
    paths = (folder / JUDGED / path.name for path in (item.part, items_file(item.part)))
    of_documents, of_items = (pq.read_table(path)["reason"].to_pylist() for path in paths)
    ledger: list[dict[str, Any]] = []
    item_ledger: list[dict[str, Any]] = []
    kept: list[Kept] = []
    at = 0
    for number, document in enumerate(documents):
        own = slice(at, at := at + document["items"])
        rows, reasons = items[own], of_items[own]
        for i in np.flatnonzero(item.items[own]):
            reasons[i] = PICTURE_STAGE if rows[i]["text"] is None else PARAGRAPH_STAGE
        reason = of_documents[number]
        if item.documents[number] >= 0:
            reason = DOCUMENT_STAGES[item.documents[number]]
        made: Kept | None = None
        if reason is None:
            reason, matched = _settle(rules, rows, reasons)
            if reason is None:
                made = compose(document, rows, reasons, matched, rules.config.assign)
                kept.append(made)
        if reason is not None:
            reasons = [why or OF_DROPPED for why in reasons]
        verdict = "error" if document["error"] else "dropped" if reason else "kept"
        numbers = {"texts": made.texts if made else 0, "images": len(made.sizes) - 1 if made else 0}
        ledger.append({**document, "verdict": verdict, "reason": reason, **numbers})
        item_ledger += [
            {
                "uid": document["uid"],
                "index": index,
                "kind": "image" if row["text"] is None else "text",
                "verdict": "dropped" if why else "kept",
                "reason": why,
                "src": row["src"] if row["text"] is None else None,
                "characters": len(row["text"]) if row["text"] is not None else None,
            }
            for index, (row, why) in enumerate(zip(rows, reasons, strict=True))
        ]
    tables = {
        "ledger": pa.Table.from_pylist([{k: row[k] for k in LEDGER.names} for row in ledger], schema=LEDGER),
        "items": pa.Table.from_pylist(item_ledger, schema=ITEM_LEDGER),
        "kept": Kept.table(kept),
    }
    for name, table in tables.items():
        write_part(folder / name / item.name, table)
    by_kind = {
        kind: Counter((row["verdict"], row["reason"]) for row in item_ledger if row["kind"] == kind)
        for kind in ("text", "image")
    }
    return {"document": Counter((row["verdict"], row["reason"]) for row in ledger), **by_kind}


def _settle(
    rules: Rules, rows: list[dict[str, Any]], reasons: list[str | None]
) -> tuple[str | None, dict[int, tuple[int, float]]]:
    """The last steps within a document; writes into `reasons`.

    Returns:
        (why the document goes, or None; for each assigned picture, by its row, (row of its sentence, cosine))
    """
    _drop_repeated_pictures(rules.config.near_distance, rows, reasons)
    for i, row in enumerate(rows):
        if reasons[i] is None and row["text"] is not None and rules.is_boilerplate(row["text"]):
            reasons[i] = "paragraph_boilerplate"
    matched: dict[int, tuple[int, float]] = {}
    if rules.config.assign is not None:
        matched = _assign(rules.config.assign.min_similarity, rows, reasons)
    left = [row["text"] for row, reason in zip(rows, reasons, strict=True) if reason is None]
    texts = [text for text in left if text is not None]
    if not texts or len(texts) == len(left):
        return "nothing_left", matched
    if (assigning := rules.config.assign) is not None:
        if (reason := rules.document(texts, len(left) - len(texts))) is not None:
            return reason, matched
        well = sum(cosine > assigning.well_matched for _, cosine in matched.values())
        if well / len(matched) < assigning.min_well_matched:  # a quotient is rounded as the number that is written
            return "document_matches", matched
    return None, matched


def _drop_repeated_pictures(near: int | None, rows: list[dict[str, Any]], reasons: list[str | None]) -> None:
    """Of equal pictures (or nearly equal ones) in a document, the first stays."""
    digests: set[bytes] = set()
    hashes = np.zeros(0, np.uint64)
    for i, row in enumerate(rows):
        if reasons[i] is not None or row["text"] is not None:
            continue
        hashed = np.uint64(row["phash"])
        close = near is not None and (np.bitwise_count(hashes ^ hashed) <= near).any()
        if row["sha256"] in digests or close:
            reasons[i] = "image_repeated"
            continue
        digests.add(row["sha256"])
        hashes = np.append(hashes, hashed)


def _assign(
    min_similarity: float, rows: list[dict[str, Any]], reasons: list[str | None]
) -> dict[int, tuple[int, float]]:
    texts = [i for i, row in enumerate(rows) if row["text"] is not None]  # as the cosines are in
    left = [place for place, i in enumerate(texts) if reasons[i] is None]
    pictures = [i for i, row in enumerate(rows) if row["text"] is None and reasons[i] is None]
    if not left or not pictures:
        return {}
    similarity = np.array([np.asarray(rows[i]["similarity"], np.float32)[left] for i in pictures])
    found = match(similarity, min_similarity)
    matched = {}
    for i, sentence, cosine in zip(pictures, found.sentence.tolist(), found.similarity.tolist(), strict=True):
        if sentence < 0:
            reasons[i] = "image_unmatched"
        else:
            matched[i] = (texts[left[sentence]], cosine)
    return matched
