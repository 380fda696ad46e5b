"""Drop captions that are no description: boilerplate alt text, file names, numbers, markup.

The rules are shapes that web pages share, not a list of known captions. Each is
one regular expression below with what it is for; recipes add theirs by
`patterns`. A rule that is a whole-caption match may be bold; one that may occur
inside a true sentence ("a stock car") has to be narrow.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError

WHOLE = {
    # IMG_2041, DSC00012, P1010233, Screenshot 2020-01-02 at 10.11.12, WhatsApp Image 2019-..., image (3)
    "camera name": r"(img|dscn?|dscf|pict?|image|photo|scan|screen ?shot|whatsapp image|unnamed|download|file|p10)"
    r"[\s_\-]*\(?[\d][\d\s_\-.:()at]*(\.\w{2,5})?",
    # my-holiday-photo-3.jpg, product_0231_large.PNG?w=300: something that ends as a file does
    "file name": r"(?=\S+\Z)\S+?\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|html?|php|aspx?|mp4)([?#]\S*)?",
    "file name with spaces": r".*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)"
    r"|(.*\s)?+\S*?\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)[?#]\S*",
    # red_shoe_0231, hero-banner-2-large: three or more parts without a single space
    "slug": r"[a-z0-9]+([_\-][a-z0-9]+){2,}",
    # 8f14e45fceea167a5a36dedd4bea2543, B07XJ8C8F5: an identifier
    "identifier": r"(?=\S*\d)[a-z0-9_\-]{8,}|[0-9a-f]{16,}",
    # 640x480, 1,234, 2019-03-02, $ 12.99
    "digits": r"[\W\d_]*(\d\s*x\s*\d[\W\d_]*)?",
    "web address": r"(https?://|www\.)\S+",
    # placeholders that a page's author never filled in
    "placeholder": r"(untitled|no (title|caption|description|image|alt)|title|caption|alt|default|null|none|nan"
    r"|undefined|n/?a|test|unknown|placeholder|thumbnail|thumb|logo|icon|banner|image|img|photo|picture|pic|avatar|spacer|pixel"
    r"|loading|blank|product|item|slide|header|background)s?([\s_\-#.:]*(image|img|photo|picture|alt|text|here))*"
    r"[\s_\-#.:()]*+\d*+[\s.!…]*+",
}
INSIDE = {
    # what a page tells its visitor to do
    "call to action": r"\b(click|tap) (here|to|for|on|image|photo|picture)\b"
    r"|\bto (enlarge|zoom in|see full size|view larger)\b"
    r"|\b(hover|scroll|swipe|press) (here|over|to|for)\b.{0,20}\b(image|enlarge|zoom|view|larger|more|details)\b"
    r"|\b(view|see|open|show|load) (full ?(size|screen|image)|larger|original|big(ger)? (image|version|picture)|more)\b"
    r"|\b(shop|buy|order|subscribe|sign up|log in|download) (now|here|today|free)\b|\b(read|learn) more\b"
    r"|\badd to (cart|basket|wish ?list|bag)\b|\bfree shipping\b|\bpin it\b|\bshare (on|this)\b|\bfollow us\b",
    # what agencies and platforms add by themselves
    "agency": r"\b(royalty[- ]free|stock (photos?|images?|pictures?|illustrations?|vectors?|footage)"
    r"|(photo|image|picture) stock|shutterstock|getty ?images|alamy|istock(photo)?|dreamstime|depositphotos"
    r"|adobe ?stock|123rf|creative commons|all rights reserved|copyright)\b|©|\(c\) ?\d{4}",
    "machine alt": r"\b(image|photo|picture) may contain\b|\bno (photo )?description( of photo)? available\b"
    r"|\b(image|photo|picture) (not found|not available|unavailable|coming soon|preview|gallery|courtesy of)\b"
    r"|\b(photo|image|picture|video) (of the|#|no\.?|number) ?(day|\d+)|\bprofile (picture|photo|image)\b",
    # &nbsp;
    "entity": r"&[a-z]{2,8};|&#\d+;",
    "site title": r"\s[|»›]\s|\.(com|net|org)\b",
}
SPANS = {
    # <img ...>, {{ title }}, [caption id=...]: by its end, how it begins
    ">": r"</?[a-z]",
    "}}": r"\{\{",
    "]": r"\[/?[a-z]+[ \]]",
}


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """Caption must have `min_words`, `min_chars`, and `min_letters` as share of what is not space, and fit no rule.

    `builtin`: whether the rules of this file apply. `patterns`: further regular
    expressions, each searched by itself anywhere in the caption, case-insensitively.
    """

    min_words: int = 1
    min_chars: int = 1
    min_letters: float = 0.0
    builtin: bool = True
    patterns: list[str] = field(default_factory=list)
    scope: ClassVar[Literal["pool"]] = "pool"

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as reason:
                raise UserError(f"caption_rules.patterns: {pattern!r} is no regular expression ({reason})") from None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("caption",)

    def apply(self, table: pa.Table, decision: Any) -> np.ndarray:
        whole = re.compile("|".join(f"(?:{p})" for p in WHOLE.values()), re.IGNORECASE) if self.builtin else None
        # Not joined with those of the recipe, whose flags and backreferences would then be of something else.
        inside = ["|".join(f"(?:{p})" for p in INSIDE.values())] if self.builtin else []
        searched = [re.compile(pattern, re.IGNORECASE) for pattern in (*inside, *self.patterns)]
        spans = {end: re.compile(begin, re.IGNORECASE) for end, begin in SPANS.items()} if self.builtin else {}
        captions = table["caption"].to_pylist()
        return np.fromiter((self._fits(c, whole, searched, spans) for c in captions), bool, table.num_rows)

    def _fits(
        self,
        caption: str,
        whole: re.Pattern[str] | None,
        searched: Sequence[re.Pattern[str]],
        spans: Mapping[str, re.Pattern[str]],
    ) -> bool:
        text = " ".join(caption.split())
        words = text.split(" ") if text else []
        if len(words) < self.min_words or len(text) < self.min_chars:
            return False
        visible = text.replace(" ", "")
        if visible and sum(map(str.isalpha, visible)) / len(visible) < self.min_letters:
            return False
        if whole and whole.fullmatch(text):
            return False
        if any(begin.search(text, 0, text.rfind(end) + len(end)) for end, begin in spans.items()):
            return False
        return not any(pattern.search(text) for pattern in searched)

    def describe(self, decision: Any) -> dict[str, Any]:
        return {}
