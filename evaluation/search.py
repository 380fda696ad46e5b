"""`gemsmith search`: the pictures of a folder that are nearest to texts and pictures, as lines and one page.

Exact: FAISS compares a query with every picture. Scores are inner products of
unit vectors; those that are equal to six decimals are a tie, which goes by uid.

Captions and uids come from the web: the page escapes them, holds pictures that
were decoded and encoded anew, and forbids itself scripts and any address but data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.errors import UserError, one_line
from curation.sources import open_shard
from evaluation.encode import Model, batch_of
from evaluation.evaluate import load_checkpoint
from evaluation.index import Index, build, rgb, shards_of
from evaluation.report import environment, inline

if TYPE_CHECKING:
    from PIL.Image import Image

DECIMALS = 6
PAGE = "hits.html"


@dataclass(frozen=True, kw_only=True)
class Query:
    """A text, or a picture with the name of its file."""

    text: str
    picture: "Image | None" = None


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A picture that was found; row: of the index."""

    row: int
    uid: str
    caption: str
    score: float


def search(
    *,
    checkpoint: Path,
    data: str,
    texts: Sequence[str] = (),
    images: Sequence[Path] = (),
    top: int = 12,
    out: Path | None = None,
    batch: int | None = None,
    load: Callable[[Path], Any] = load_checkpoint,
) -> tuple[list[list[Hit]], Path]:
    """The `top` pictures for each text, then for each picture, and the page that shows them.

    Args:
        data: a folder, file or URL that curation reads as a pool.
        out: folder of the index and the page; None: DATA.search.
        batch: pictures that are embedded at a time (it changes the last digits, so another one makes another index);
            None: few of a model that sees them whole.
        load: how a path becomes a model, to search with models that are not ours.

    Raises:
        UserError: no query, an unreadable one, unusable data or checkpoint.
    """
    if not texts and not images:
        raise UserError("gemsmith search: nothing to look for; give a text, or --image FILE")
    if top < 1:
        raise UserError(f"--top: {top} is below 1; give how many pictures to show")
    queries = [_text_query(text) for text in texts] + [_image_query(path) for path in images]
    out = _place(data, out)
    shards = shards_of(data)
    model = load(checkpoint)
    size = batch_of(model, batch)
    index = build(model, data, shards, out, size)
    found = nearest(index, embedded(model, queries, size), top)
    page = out / PAGE
    page.write_text(_page(model, data, index, queries, found))
    return found, page


def _place(data: str, out: Path | None) -> Path:
    """Where the index goes: beside the data, never among them."""
    if "://" in data:
        if out is None:
            raise UserError(f"--out: {data} is no folder of this machine; name one for the index")
        return out
    pictures = Path(data).resolve()
    if out is not None and out.resolve().is_relative_to(pictures):
        raise UserError(f"--out {out}: lies within --data {data}, which it would change; name a folder beside it")
    return out or pictures.with_name(f"{pictures.name}.search")


def _text_query(text: str) -> Query:
    if not text.strip():
        raise UserError("a text: is empty; say what to look for")
    return Query(text=text)


def _image_query(path: Path) -> Query:
    try:
        picture, reason = rgb(path.read_bytes())
    except OSError as error:
        raise UserError(f"--image {path}: cannot be read ({error.strerror}); name a picture") from None
    if picture is None:
        raise UserError(f"--image {path}: is no picture that can be read ({reason}); name another")
    return Query(text=path.name, picture=picture)


def embedded(model: Model, queries: Sequence[Query], batch: int) -> np.ndarray:
    """Unit vectors fp32 [Q, D], a query at a time: what is found does not depend on the others. A picture is repeated
    to a batch of the index's size, so that it gets the vector that it has there."""
    vectors = [
        model.embed_texts([query.text])
        if query.picture is None
        else model.embed_images(_pixels(model, query, batch))[:1]
        for query in queries
    ]
    found = np.concatenate([vector.float().cpu().numpy() for vector in vectors])
    if not np.isfinite(found).all():
        raise UserError(f"checkpoint {model.name}: an embedding is NaN or infinite; name an earlier checkpoint")
    return found


def _pixels(model: Model, query: Query, batch: int) -> Any:
    assert query.picture is not None
    try:
        return model.images([query.picture] * batch)
    except Exception as error:  # processors raise almost anything
        raise UserError(
            f"--image {query.text}: the model refuses it ({one_line(error, 120)}); name another picture"
        ) from None


def nearest(index: Index, queries: np.ndarray, top: int) -> list[list[Hit]]:
    """The `top` pictures of each query [Q, D], best first, ties by uid."""
    total, uids, captions = index.vectors.ntotal, index.rows["uid"], index.rows["caption"]
    found = []
    for query in queries:
        wanted = min(total, top + 1)
        while True:
            scores, rows = (side[0] for side in index.vectors.search(query[None], wanted))
            rounded = scores.astype(np.float64).round(DECIMALS)
            if wanted == total or rounded[-1] < rounded[top - 1]:  # no tie reaches beyond what was asked for
                break
            wanted = min(total, 2 * wanted)
        best = sorted(zip(-rounded, (uids[int(row)].as_py() for row in rows), rows.tolist(), strict=True))[:top]
        found.append([Hit(row=row, uid=uid, caption=captions[row].as_py(), score=-key) for key, uid, row in best])
    return found


def as_text(texts: Sequence[str], images: Sequence[Path], found: Sequence[Sequence[Hit]], show: int = 5) -> str:
    """The first hits of each query, for a terminal."""
    lines = []
    for query, hits in zip([*map(repr, texts), *map(str, images)], found, strict=True):
        lines.append(query)
        lines += [f"  {hit.score:6.3f}  {hit.uid}  {hit.caption[:80]!r}" for hit in hits[:show]]
    return "\n".join(lines)


def _page(model: Model, data: str, index: Index, queries: Sequence[Query], found: Sequence[Sequence[Hit]]) -> str:
    sections = [
        {
            "text": query.text,
            "picture": inline(query.picture.copy(), 220) if query.picture is not None else None,
            "hits": [{"hit": hit, "picture": _thumbnail(index, hit.row)} for hit in hits],
        }
        for query, hits in zip(queries, found, strict=True)
    ]
    return (
        environment()
        .get_template("search.html.j2")
        .render(
            title="What the pictures answer",
            data=data,
            checkpoint=model.name,
            total=len(index.rows),
            left_out=sorted(index.left_out.items(), key=lambda item: (-item[1], item[0])),
            sections=sections,
        )
    )


def _thumbnail(index: Index, row: int) -> str:
    where = {name: index.rows[name][row].as_py() for name in ("shard", "offset", "size")}
    with open_shard(where["shard"]) as tape:
        picture, _ = rgb(tape[where["offset"] : where["offset"] + where["size"]])
    assert picture is not None, "it was decoded when it was embedded"
    return inline(picture, 320)
