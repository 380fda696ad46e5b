"""The measures of texts by their definitions, the rules by cases at their edges, sentences by examples."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.documents import words
from curation.documents.filters import ImageRules, ListFiles, TextRules, load_lists
from curation.documents.sentences import split_sentences
from curation.errors import UserError

LISTS = load_lists(ListFiles())
SOUND = {"src": "https://x.example/photo.jpg", "image_format": "jpg", "width": 640, "height": 480}
OBELICS = ImageRules(
    formats=["jpg", "png", "webp"],
    min_side=150,
    max_side=20_000,
    rendered_min_side=150,
    max_aspect=2,
    url_words=["logo", "button", "icon", "plugin", "widget"],
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, None),
        ({"width": 150, "height": 150}, None),
        ({"width": 149}, "image_small"),
        ({"height": 149}, "image_small"),
        ({"width": 300, "height": 150}, None),
        ({"width": 301, "height": 150}, "image_aspect"),
        ({"width": 150, "height": 301}, "image_aspect"),
        ({"width": 20_001, "height": 15_000}, "image_large"),
        ({"image_format": "gif"}, "image_format"),
        ({"src": "https://x.example/LOGO.png"}, "image_url"),
        ({"src": "https://x.example/plugins/a.jpg"}, "image_url"),
        ({"src": "data:image/png;base64,iconlogo"}, None),
        ({"rendered": ("100", "100")}, "image_rendered_size"),
        ({"rendered": ("150px", "auto")}, None),
        ({"rendered": ("20%", "")}, "image_rendered_size"),  # of 640
        ({"rendered": ("100%", "100%")}, None),
        ({"rendered": ("99999999999999999999", "x" * 9999)}, None),
    ],
)
def test_pictures_at_the_edges(said: dict[str, object], reason: str | None) -> None:
    assert OBELICS.reason(**{**SOUND, **said}) == reason  # type: ignore[arg-type]


GOOD = "This is the kind of text that a person would write about the things that they have seen."


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ({"min_words": 4}, "only three words", "words"),
        ({"min_words": 4}, "these are four words", None),
        ({"max_words": 3}, "these are four words", "words"),
        ({"min_words": 4}, "one - two - three !!", "words"),  # marks alone are no words
        ({"max_character_repetition": 0.1}, "ha ha ha ha ha ha ha ha ha ha ha ha ha ha", "character_repetition"),
        ({"max_character_repetition": 0.1}, GOOD, None),
        ({"max_word_repetition": 0.1}, "buy it now and here " * 4, "word_repetition"),
        ({"max_special_characters": 0.3}, "12.05.2021 - 14:30 | 17 C", "special_characters"),
        ({"max_special_characters": 0.3}, GOOD, None),
        ({"min_stopwords": 0.3}, "Red shoes cheap price best quality", "stopwords"),
        ({"min_stopwords": 0.3}, GOOD, None),
        ({"min_punctuation": 0.001, "punctuation_from": 12}, "word " * 12, "punctuation"),
        ({"min_punctuation": 0.001, "punctuation_from": 12}, "word " * 11, None),
        ({}, "", None),
    ],
)
def test_texts_at_the_edges(rules: dict[str, float], text: str, reason: str | None) -> None:
    assert TextRules(**rules).reason(text, LISTS) == reason  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text("ab ", max_size=60), st.integers(1, 6))
def test_character_repetition_by_its_definition(text: str, n: int) -> None:
    grams = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    top = grams.most_common(int(len(grams) ** 0.5))
    repeats = sum(count for _, count in top if count > 1)
    total = max(len(text) - n + 1, 1)
    assert words.character_repetition(text, n) == pytest.approx(repeats / total)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 4))
def test_word_repetition_by_its_definition(listed: list[str], n: int) -> None:
    grams = [tuple(listed[i : i + n]) for i in range(len(listed) - n + 1)]
    repeats = sum(grams.count(gram) > 1 for gram in grams)
    assert words.word_repetition(listed, n) == pytest.approx(repeats / max(len(grams), 1))


def test_words_lose_what_is_special_at_their_ends() -> None:
    assert words.words_of('"Hello", it\'s (2021) — été! ***') == ["hello", "it's", "été"]
    assert words.special_characters("ab 1!") == 0.6
    assert words.plain_spaces("a\u00a0b\u3000c") == "a b c"


def test_lists_are_files_where_a_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "flagged.txt").write_text("Bad\nworse\n\n")
    lists = load_lists(ListFiles(flagged_words=str(tmp_path / "flagged.txt")))
    rules = TextRules(max_flagged_words=0.01)
    assert rules.reason("a bad thing", lists) == "flagged_words"
    assert rules.reason("a good thing", lists) is None
    with pytest.raises(UserError, match=r"lists\.stopwords"):
        load_lists(ListFiles(stopwords=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is here. Two follows! Is three? Yes.", ["One is here.", "Two follows!", "Is three?", "Yes."]),
        ("Dr. Smith met Mr. J. Brown in St. Louis. So?", ["Dr. Smith met Mr. J. Brown in St. Louis.", "So?"]),
        ('He said "Stop." Then he went.', ['He said "Stop."', "Then he went."]),
        ("It cost 3.50 and v1.2 is out. 2021 was good.", ["It cost 3.50 and v1.2 is out.", "2021 was good."]),
        ("1. First point. 2nd part is lower", ["1. First point.", "2nd part is lower"]),
        ("See example.org for more... and so on.", ["See example.org for more... and so on."]),
        ("Wait… What?! (Really.) Yes", ["Wait…", "What?!", "(Really.)", "Yes"]),
        ("今日は晴れ。明日は雨？はい。", ["今日は晴れ。", "明日は雨？", "はい。"]),
        ("a line\nanother line", ["a line", "another line"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


@settings(deadline=None)
@given(st.text(max_size=200))
def test_sentences_lose_nothing_but_blanks(text: str) -> None:
    blanks = re.compile(r"\s+")
    assert blanks.sub("", "".join(split_sentences(text))) == blanks.sub("", text)
