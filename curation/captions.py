"""What a sample says: which caption curation scores, and all captions that training and evaluation may use.

One reading for the three of them, so that a caption that was scored is the
caption that is trained on. The text member wins over the json's `caption`
because img2dataset's users edit it; `captions` (several for one picture) is
for training and evaluation alone. The messages of the errors are the reasons
that ledgers and lists of left-out samples show.
"""

from typing import Any


def scored_caption(record: dict[str, Any], text: bytes | None) -> str:
    """The caption that curation scores: the text member, else the json's `caption`.

    Raises:
        ValueError: "caption_missing", or "caption_not_utf8" (bytes that are
            not UTF-8, or a lone surrogate, which JSON allows and UTF-8 cannot hold).
    """
    caption = record.get("caption") if text is None else text
    if not isinstance(caption, str | bytes):
        raise ValueError("caption_missing")
    return _utf8(caption)


def read_captions(record: Any, text: bytes | None) -> tuple[str, list[str]]:
    """The scored caption and all captions of a sample.

    Args:
        record: what the json member parses to; {} where there is none.
        text: the bytes of the txt member, or None.

    Returns:
        (scored, captions): `captions` are the json's where it has some, else
        the scored one alone. Without text and `caption` the first of them
        stands for the scored one.

    Raises:
        ValueError: as `scored_caption`; "json_broken" where the record is no
            mapping, "captions_broken" where its `captions` are no list of texts.
    """
    if not isinstance(record, dict):
        raise ValueError("json_broken")
    captions = record.get("captions")
    if captions is None or captions == []:
        scored = scored_caption(record, text)
        return scored, [scored]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions_broken")
    captions = [_utf8(caption) for caption in captions]
    alone = text is None and record.get("caption") is None
    return captions[0] if alone else scored_caption(record, text), captions


def _utf8(caption: str | bytes) -> str:
    try:
        return (caption if isinstance(caption, bytes) else caption.encode()).decode()
    except UnicodeError:
        raise ValueError("caption_not_utf8") from None
