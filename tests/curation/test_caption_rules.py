"""The rules for captions against the plainer expressions that they were, which take the square of a long caption."""

import re
import time
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curation.selection import caption_rules
from curation.selection.caption_rules import INSIDE, WHOLE, CaptionRules

EXTENSIONS = "jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif"
PLAIN = {
    "file name": rf"\S+\.({EXTENSIONS}|pdf|html?|php|aspx?|mp4)([?#]\S*)?",
    "file name with spaces": rf".*\.({EXTENSIONS})([?#]\S*)?",
    "digits": r"[\W\d_]*(\d+\s*x\s*\d+)?[\W\d_]*",
    "placeholder": WHOLE["placeholder"].replace(r"[\s_\-#.:()]*+\d*+[\s.!…]*+", r"[\s_\-#.:()]*\d*[\s.!…]*"),
}
MARKUP = r"</?[a-z][^>]*>|&[a-z]{2,8};|&#\d+;|\{\{.*?\}\}|\[/?[a-z]+( [^\]]*)?\]"
CAPTIONS = st.lists(
    st.sampled_from(
        [
            *("a", "Z", "x", "X", "7", "12", "²", "é", " ", "_", "-", ".", "…", "!", "(", ")", "#", "?", ":", "/"),
            *("<", ">", "</b", "{", "}", "{{", "}}", "[", "]", "[a", "[/url", "&amp;", "&#3", ";", "\u0301", "\x1f"),
            *(".jpg", ".PNG", ".html", ".jpg?", "image", "photo", "untitled", "no title", "640x480", "n/a"),
        ]
    ),
    max_size=14,
).map("".join)


def test_the_plain_expressions_are_other_ones() -> None:
    assert all(PLAIN[name] != WHOLE[name] for name in PLAIN)


@settings(deadline=None, max_examples=500)
@given(CAPTIONS)
@example("a .jpg?b c.png?d")
@example(".jpg?a .jpg")
@example("1 x 2x3")
@example("12x x7")
@example("image 3 .. !")
@example("image image...(3)")
def test_whole_captions_fit_as_the_plain_expressions_say(caption: str) -> None:
    text = " ".join(caption.split())
    for name, plain in PLAIN.items():
        ours = re.fullmatch(WHOLE[name], text, re.IGNORECASE)
        assert bool(ours) == bool(re.fullmatch(plain, text, re.IGNORECASE)), name


@settings(deadline=None, max_examples=500)
@given(st.lists(CAPTIONS, min_size=1, max_size=8))
@example(["}} {{", "{{}}", "{{ }} {{", "> <a", "<a > <b", "] [a", "[a] [", "[a [b]", "[a[b ]", "[1]", "[ſ]"])
def test_markup_is_found_as_the_plain_expression_finds_it(captions: list[str]) -> None:
    with (
        patch.object(caption_rules, "WHOLE", {"none": "(?!)"}),
        patch.object(caption_rules, "INSIDE", {"entity": INSIDE["entity"]}),
    ):
        kept = CaptionRules(min_words=0, min_chars=0).apply(pa.table({"caption": captions}), None)
    found = [bool(re.search(MARKUP, " ".join(caption.split()), re.IGNORECASE)) for caption in captions]
    assert kept.tolist() == [not one for one in found]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "hostile",
    [
        *("1 " * 10**5 + "a", "1" * 10**6 + "a", ".jpg?" * 10**5 + " a", "a.jpg#" * 10**5 + " b"),
        *("untitled" + "." * 10**6, "image " * 10**5 + "a", "photo" + " -" * 10**5, "a-" * 10**5 + "!"),
        *("<a" * 10**5, "{{" * 10**5, "[a " * 10**5),
    ],
)
def test_a_caption_of_a_megabyte_takes_linear_time(hostile: str) -> None:
    began = time.process_time()
    CaptionRules().apply(pa.table({"caption": [hostile + "é?"]}), None)
    assert time.process_time() - began < 20  # the square of the length would be hours
