"""Which captions a sample has, and that curation scores the one that training and evaluation are given first."""

import json
from pathlib import Path
from typing import Any

import pytest

from curation.captions import read_captions
from curation.pool import read_row
from curation.tar import open_shard, samples
from evaluation.data import open_retrieval
from tests.curation.conftest import picture, write_tar


@pytest.mark.parametrize(
    ("record", "text", "expected"),
    [
        ({"caption": "j"}, b"t", ("t", ["t"])),
        ({"caption": "j"}, None, ("j", ["j"])),
        ({}, "ü".encode(), ("ü", ["ü"])),
        ({"caption": "j", "captions": ["a", "b"]}, b"t", ("t", ["a", "b"])),
        ({"caption": "j", "captions": ["a", "b"]}, None, ("j", ["a", "b"])),
        ({"captions": ["a", "b"]}, None, ("a", ["a", "b"])),
        ({"caption": "j", "captions": []}, None, ("j", ["j"])),
        ({"caption": "j", "captions": None}, None, ("j", ["j"])),
        ({"caption": 7}, b"t", ("t", ["t"])),
    ],
)
def test_what_is_read(record: Any, text: bytes | None, expected: tuple[str, list[str]]) -> None:
    assert read_captions(record, text) == expected


@pytest.mark.parametrize(
    ("record", "text", "reason"),
    [
        ([], b"t", "json_broken"),
        (None, b"t", "json_broken"),
        ("caption", None, "json_broken"),
        ({}, None, "caption_missing"),
        ({"caption": None}, None, "caption_missing"),
        ({"caption": 7}, None, "caption_missing"),
        ({"captions": []}, None, "caption_missing"),
        ({"captions": "abc"}, b"t", "captions_broken"),
        ({"captions": {"a": 1}}, b"t", "captions_broken"),
        ({"captions": ["a", None]}, b"t", "captions_broken"),
        ({}, b"\xff\xfe", "caption_not_utf8"),
        ({"captions": ["a"]}, b"\xff\xfe", "caption_not_utf8"),
        ({"caption": "\ud800"}, None, "caption_not_utf8"),
        ({"captions": ["a", "\udfff"]}, b"t", "caption_not_utf8"),
    ],
)
def test_what_is_refused(record: Any, text: bytes | None, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_captions(record, text)


def test_curation_and_evaluation_read_the_same_caption(tmp_path: Path) -> None:
    """Text and json differ; the picture is a format that only the longer list of extensions has."""
    members = {"gif": picture(1, kind="GIF"), "json": json.dumps({"caption": "json"}).encode(), "txt": b"text"}
    shard = open_shard(write_tar(tmp_path / "0.tar", {"a": members}))
    row = read_row(shard, samples(shard)[0][0])
    data = open_retrieval(tmp_path)
    assert (data.captions, data.uids) == ([["text"]], [row.uid])
    assert row.caption == "text"
