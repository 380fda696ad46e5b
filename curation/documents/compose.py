"""What a kept document becomes: OBELICS' layout as a json, and the places of its pictures.

    {"texts": [str | null], "images": [null | "0.jpg"], "metadata": [null | {...}], "general_metadata": {...}}

Three lists of equal length; where one of the first two has something the other has
null. An entry of `images` is the extension of the picture's member, so that in
webdataset `sample[images[i]]` is its bytes. Texts side by side are one, with an empty
line between paragraphs; where pictures were assigned, each sentence stays its own
(MMC4's `text_list`) and the metadata say which one was matched, and how well.
OBELICS keeps both metadata as strings of json; here they are json themselves.
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation.documents.config import AssignRules

TABLE = pa.schema(
    [
        ("uid", pa.string()),
        ("shard", pa.string()),  # from here to `copies`, what `curation.shards.plan` reads
        ("sizes", pa.list_(pa.int64())),
        ("copies", pa.int32()),
        ("json", pa.binary()),
        ("extensions", pa.list_(pa.string())),
        ("paths", pa.list_(pa.string())),  # of the pictures, as are the next three
        ("fingerprints", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("inline", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A kept document: its json and then its pictures, in the order of their members. `sizes` are of all of them."""

    uid: str
    shard: str
    json: bytes
    texts: int
    extensions: list[str]
    sizes: list[int]
    pictures: list[dict[str, Any]]

    @staticmethod
    def table(documents: "list[Kept]") -> pa.Table:
        return pa.Table.from_pylist(
            [
                {
                    "uid": document.uid,
                    "shard": document.shard,
                    "sizes": document.sizes,
                    "copies": 1,
                    "json": document.json,
                    "extensions": document.extensions,
                    "paths": [row["path"] for row in document.pictures],
                    "fingerprints": [row["fingerprint"] for row in document.pictures],
                    "offsets": [row["offset"] for row in document.pictures],
                    "inline": [row["inline"] for row in document.pictures],
                }
                for document in documents
            ],
            schema=TABLE,
        )


def compose(
    document: dict[str, Any],
    rows: list[dict[str, Any]],
    reasons: list[str | None],
    matched: dict[int, tuple[int, float]],
    assigning: AssignRules | None,
) -> Kept:
    """The kept items of a document in its order, or with the assigned pictures at their sentences."""
    left = [i for i, reason in enumerate(reasons) if reason is None]
    order = left if assigning is None else _by_sentence(rows, left, matched, assigning.place)
    texts: list[str | None] = []
    images: list[str | None] = []
    metadata: list[dict[str, Any] | None] = []
    pictures: list[dict[str, Any]] = []
    place_of_text = {i: place for place, i in enumerate(i for i in left if rows[i]["text"] is not None)}
    for i in order:
        row = rows[i]
        if row["text"] is None:
            pictures.append(row)
            texts.append(None)
            images.append(f"{len(pictures) - 1}.{row['format']}")
            metadata.append(_metadata(document, row))
            if i in matched:
                sentence, cosine = matched[i]
                metadata[-1] |= {"matched_text_index": place_of_text[sentence], "matched_sim": cosine}  # type: ignore[operator]
        elif assigning is None and texts and texts[-1] is not None:
            texts[-1] += "\n\n" + row["text"]
        else:
            texts.append(row["text"])
            images.append(None)
            metadata.append(None)
    assert len(texts) == len(images) == len(metadata)
    written = json.dumps(
        {
            "texts": texts,
            "images": images,
            "metadata": metadata,
            "general_metadata": {"url": document["url"], "key": document["key"], "uid": document["uid"]},
        },
        ensure_ascii=False,
    ).encode()
    sizes = [len(row["inline"]) if row["inline"] is not None else row["size"] for row in pictures]
    return Kept(
        uid=document["uid"],
        shard=document["shard"],
        json=written,
        texts=len(place_of_text),
        extensions=["json", *(image for image in images if image is not None)],
        sizes=[len(written), *sizes],
        pictures=pictures,
    )


def _by_sentence(
    rows: list[dict[str, Any]], left: list[int], matched: dict[int, tuple[int, float]], place: str
) -> list[int]:
    """The sentences in their order, each with its pictures before or after it."""
    pictures: dict[int, list[int]] = {}
    for i, (sentence, _) in matched.items():
        pictures.setdefault(sentence, []).append(i)
    order = []
    for i in left:
        if rows[i]["text"] is not None:
            own = pictures.get(i, [])
            order += [*own, i] if place == "before" else [i, *own]
    return order


def _metadata(document: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    said = {
        "document_url": document["url"],
        "src": row["src"],
        "alt_text": row["alt"],
        "rendered_width": row["rendered_width"],
        "rendered_height": row["rendered_height"],
    }
    found = {"original_width": row["width"], "original_height": row["height"], "format": row["format"]}
    return {**{name: value for name, value in said.items() if value}, **found, "sha256": row["sha256"].hex()}
