"""Measuring documents: each is read once, each of its pictures decoded once, and all that rules ask for is kept.

One unit of the pool becomes two parquet files in the store, which lies in
OUT/signals and is named by the settings that decide the values: `.documents` with a
row for each document, `.items` with a row for each text and picture in their order.
Rules then read columns, so that another threshold opens no picture again. The file
of documents is written last; its presence says that the unit is done.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import files
from curation.documents.assign import EncodingFailed, SentenceMeter
from curation.documents.config import DocumentsConfig
from curation.documents.pictures import InPool, Item, Limits, Unreadable
from curation.documents.source import Document, DocumentShard, read_documents
from curation.errors import UserError
from curation.hashing import config_hash
from curation.images import StripTooLong, decode
from curation.signals.fingerprints import FingerprintsMeter
from curation.signals.interface import Decoded
from curation.store import NOT_FINITE, SIGNAL_FAILED, write_part

VERSION = 5  # goes up when the same pool and settings would give other rows
MAX_SIMILARITIES = 4_000_000  # cosines of one document
DOCUMENTS = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("url", pa.string()),
        ("domain", pa.string()),
        ("error", pa.string()),
        ("items", pa.int32()),  # how many rows of `.items` are its own
    ]
)
ITEMS = pa.schema(
    [
        ("text", pa.string()),  # null for a picture
        ("src", pa.string()),
        ("alt", pa.string()),
        ("rendered_width", pa.string()),
        ("rendered_height", pa.string()),
        ("path", pa.string()),
        ("fingerprint", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("inline", pa.binary()),  # the bytes, where the page itself holds them
        ("error", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),
        ("phash", pa.uint64()),
        ("similarity", pa.list_(pa.float32())),  # with each text of its document, where the recipe assigns
    ]
)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Sets a worker up; called with a unit it writes the unit's files and counts {"documents", "errors"}; "causes" are
    a line for each reason of the model's, of the first document that has it."""

    config: DocumentsConfig
    store: Path

    @property
    def gpu(self) -> bool:
        """Whether a worker needs a share of a GPU (`curation.workers`)."""
        return self.config.assign is not None and self.config.assign.clip.device == "cuda"

    def __call__(self) -> Callable[[DocumentShard], dict[str, Any]]:
        return _Measure(self.config, self.store)


def store_folder(config: DocumentsConfig, root: Path) -> Path:
    return root / f"documents-{config_hash([VERSION, config.measured()])}"


def documents_file(store: Path, shard: DocumentShard) -> Path:
    return store / f"{shard.fingerprint}.documents.parquet"


def items_file(documents: Path) -> Path:
    """The file of items that belongs to a file of documents."""
    return documents.with_name(documents.name.replace(".documents.", ".items."))


def known(store: Path, shard: DocumentShard) -> dict[str, Any] | None:
    """What measuring the unit once gave, or None where it was not measured."""
    path = documents_file(store, shard)
    return _counts(pq.read_table(path, columns=["error"])) if path.exists() else None


def _counts(documents: pa.Table) -> dict[str, Any]:
    errors = Counter(documents["error"].drop_null().to_pylist())
    return {"documents": documents.num_rows, "errors": errors, "causes": []}


class _Measure:
    def __init__(self, config: DocumentsConfig, store: Path) -> None:
        self._store, self._pool = store, InPool()
        self._sentences = SentenceMeter(config.assign.clip) if config.assign else None
        self._fingerprints = FingerprintsMeter()
        self._limits = Limits(
            html_bytes=config.max_html_bytes,
            image_bytes=config.max_image_bytes,
            items=config.max_items,
            sentences=config.assign is not None,
        )

    def __call__(self, shard: DocumentShard) -> dict[str, Any]:
        documents: list[dict[str, Any]] = []
        items: list[dict[str, Any]] = []
        causes: dict[str, str] = {}  # by reason
        for document in read_documents(shard, self._pool, self._limits):
            rows, error, cause = self._rows(document)
            if error is not None and cause is not None:
                causes.setdefault(error, f"{shard.path} {document.key}: {error}: assign.clip: {cause}")
            items += rows
            documents.append(
                {
                    "uid": document.uid,
                    "key": document.key.encode("utf-8", "replace").decode(),
                    "shard": shard.path,
                    "url": document.url,
                    "domain": document.domain(shard).encode("utf-8", "replace").decode(),
                    "error": error,
                    "items": len(rows),
                }
            )
        self._pool.close()
        path = documents_file(self._store, shard)
        write_part(items_file(path), pa.Table.from_pylist(items, schema=ITEMS))
        table = pa.Table.from_pylist(documents, schema=DOCUMENTS)
        write_part(path, table)
        return {**_counts(table), "causes": list(causes.values())}

    def _rows(self, document: Document) -> tuple[list[dict[str, Any]], str | None, str | None]:
        """The rows of a document's items, its error, and what the model did if that is one of its."""
        if document.error is not None:
            return [], document.error, None
        texts = [item.text for item in document.items if item.text is not None]
        if self._sentences and len(texts) * (len(document.items) - len(texts)) > MAX_SIMILARITIES:
            return [], "too_many_items", None
        if not self._sentences:
            return [self._row(item) for item in document.items], None, None
        self._sentences.begin()
        try:
            rows = [self._row(item) for item in document.items]
            cosines = self._sentences.similarities(texts)
        except EncodingFailed as failure:
            return [], SIGNAL_FAILED, str(failure)
        if not np.isfinite(cosines).all():
            return [], NOT_FINITE, "a cosine is NaN or infinite"
        decoded = [row for row in rows if row["text"] is None and row["error"] is None]
        for row, values_s in zip(decoded, cosines, strict=True):
            row["similarity"] = values_s
        return rows, None, None

    def _row(self, item: Item) -> dict[str, Any]:
        row: dict[str, Any] = {
            "text": item.text,
            "src": item.src,
            "alt": item.alt,
            "rendered_width": item.width,
            "rendered_height": item.height,
            "inline": item.inline,
            "error": item.error,
        }
        if item.place is not None:
            row |= vars(item.place)
        if item.text is None and item.error is None:
            row |= self._look(item)
        return row

    def _look(self, item: Item) -> dict[str, Any]:
        """Decode a picture: {"error"} where it cannot be, else format, size and hashes."""
        assert item.place is not None or item.inline is not None, "a picture that is at hand"
        try:
            raw = self._pool.read(item.place) if item.place is not None else item.inline or b""
        except (Unreadable, OSError) as reason:
            if isinstance(reason, OSError) and files.of_the_machine(reason):
                raise
            return {"error": "image_unreadable"}
        image, image_format, error = decode(raw)
        if image is None:
            return {"error": error}
        try:
            seen = Decoded(uid="", caption="", record={}, image=image, image_format=image_format, raw=raw)
            _, phash = self._fingerprints.see(seen)
            pixels = self._sentences.pixels(image) if self._sentences else None
        except (UserError, MemoryError):
            raise
        except StripTooLong:
            return {"error": "decompression_bomb"}
        except Exception:  # of a transform, on a mode that it does not know
            return {"error": "image_decode"}
        if self._sentences:
            self._sentences.see(pixels)
        width, height = image.size
        sha256 = hashlib.sha256(raw).digest()
        return {"format": image_format, "width": width, "height": height, "sha256": sha256, "phash": phash}


def picture_key(sha256: bytes) -> np.uint64:
    """The first 64 bits of a picture's hash, which stand for it where a pool's pictures are counted."""
    return np.uint64(int.from_bytes(sha256[:8], "big"))
