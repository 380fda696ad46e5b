"""What is made of a document's kept items: the order of its texts, every picture once, lists of one length."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from curation.documents.compose import Kept, compose
from curation.documents.config import AssignRules
from curation.signals.clip import Clip

DOCUMENT = {"uid": "u", "shard": "s", "key": "k", "url": None}
ROW = st.tuples(st.booleans(), st.booleans())  # (is a picture, is kept)


def row_of(index: int, picture: bool) -> dict[str, Any]:
    shape = {"width": 200, "height": 160, "format": "jpg", "sha256": bytes(32), "inline": None, "size": 10 + index}
    said = {"src": f"{index}.jpg", "alt": "", "rendered_width": "", "rendered_height": ""}
    return {"text": None if picture else f"text {index}", **said, **shape}


def made(items: list[tuple[bool, bool]], matched: dict[int, tuple[int, float]], rules: AssignRules | None) -> Kept:
    rows = [row_of(i, picture) for i, (picture, _) in enumerate(items)]
    return compose(DOCUMENT, rows, [None if kept else "gone" for _, kept in items], matched, rules)


def read(document: Kept) -> tuple[list[str], dict[str, Any]]:
    """The kept items in order, texts taken apart again and pictures by their addresses; and the json."""
    said = json.loads(document.json)
    assert len(said["texts"]) == len(said["images"]) == len(said["metadata"])
    order: list[str] = []
    for text, image, meta in zip(said["texts"], said["images"], said["metadata"], strict=True):
        assert (text is None) == (image is not None) == (meta is not None)
        order += text.split("\n\n") if text is not None else [meta["src"]]
    assert [image for image in said["images"] if image] == document.extensions[1:]
    assert document.sizes[0] == len(document.json)
    assert document.sizes[1:] == [picture["size"] for picture in document.pictures]
    return order, said


@settings(deadline=None)
@given(st.lists(ROW, max_size=20))
def test_the_order_of_a_page_is_kept(items: list[tuple[bool, bool]]) -> None:
    order, said = read(made(items, {}, None))
    assert order == [f"{i}.jpg" if picture else f"text {i}" for i, (picture, kept) in enumerate(items) if kept]
    texts = [text is not None for text in said["texts"]]
    assert not any(one and other for one, other in pairwise(texts)), "texts side by side are one"


@settings(deadline=None)
@given(st.lists(ROW, max_size=20), st.sampled_from(["before", "after"]), st.data())
def test_assigned_pictures_stand_at_their_sentences(
    items: list[tuple[bool, bool]], place: str, data: st.DataObject
) -> None:
    kept_texts = [i for i, (picture, kept) in enumerate(items) if kept and not picture]
    kept_pictures = [i for i, (picture, kept) in enumerate(items) if kept and picture] if kept_texts else []
    items = [(picture, kept and (not picture or i in kept_pictures)) for i, (picture, kept) in enumerate(items)]
    matched = {i: (data.draw(st.sampled_from(kept_texts)), 0.5) for i in kept_pictures}
    rules = AssignRules(clip=Clip(model="any"), place=place)  # type: ignore[arg-type]
    order, said = read(made(items, matched, rules))
    expected = []
    for sentence in kept_texts:
        own = [f"{i}.jpg" for i in kept_pictures if matched[i][0] == sentence]
        expected += [*own, f"text {sentence}"] if place == "before" else [f"text {sentence}", *own]
    assert order == expected
    for meta in filter(None, said["metadata"]):
        sentence, _ = matched[int(meta["src"].removesuffix(".jpg"))]
        assert kept_texts[meta["matched_text_index"]] == sentence and meta["matched_sim"] == 0.5
