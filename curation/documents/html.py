"""A page becomes a sequence of texts and images, in the order in which a reader meets them.

What goes and what stays follows OBELICS (Laurençon et al. 2023, arXiv 2306.16527,
the simplification of the DOM, as its released code has it): tags that only style
text are unwrapped, tags outside a list of text and media tags go with all they
hold (scripts, navigation, tables, forms, list items, the head), so do blocks that
call themselves footer, header, navigation or menu; dates in `div`s go; line breaks
follow from the tags between two texts.

libxml2's tokenizer is driven as a stream of events and no tree is built. A page
is hostile input: with a tree, two hundred thousand nested `div`s cost minutes in
parsers that are otherwise fast, and recursion ends in a crash; here time is linear
and memory is that of the text.
"""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urljoin

from lxml import etree

# Where two texts meet, the strongest separator of the tags between them holds.
SEPARATORS = ("", " ", "\n", "\n\n")
NOTHING, SPACE, LINE, PARAGRAPH = range(4)
_STYLES = """a abbr acronym b bdi bdo big cite code data dfn em font i ins kbd mark q s samp shadow small span strike
strong sub sup time tt u var wbr"""
_PARAGRAPHS = "blockquote dl h1 h2 h3 h4 h5 h6 ol p ul"
_LINES = "address article aside br center dd dt div figcaption hgroup legend main marquee section summary"
_HOLDERS = "blink body caption figure html picture"
# Of these libxml2 does not know that they hold nothing: what follows a `source` would go with it.
_EMPTY = "area base basefont bgsound col command embed hr input keygen link meta param source track wbr"
UNWRAPPED = frozenset([*_STYLES.split(), *_EMPTY.split()])
BREAKS = {
    **dict.fromkeys(_PARAGRAPHS.split(), PARAGRAPH),
    **dict.fromkeys(_LINES.split(), LINE),
    **dict.fromkeys(_HOLDERS.split(), NOTHING),
}
"""The tags that hold what is kept, and how they separate it. `img` is handled apart; all other tags go."""
HEAD = frozenset(["base", "basefont", "bgsound", "link", "meta", "noscript", "script", "style", "template", "title"])
"""What a head may hold; any other tag ends it, as in HTML 5."""
BOILERPLATE_NAMES = frozenset(["footer", "header", "navigation", "nav", "navbar", "menu"])
BOILERPLATE_CLASSES = frozenset(["footer", "site-info", "more-link"])
_ADDRESSES = """src data-src data-src-fg data-scroll-image srcset data-lateloadsrc data-img-src data-original
data-gt-lazy-src data-lazy data-lazy-src src2"""
SOURCES = _ADDRESSES.split()
"""Where pages put the address of a picture; the first that holds one address counts, an inline picture only if none."""
BLANKS = re.compile(r"[ \t\n\r\f]+")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, separated by an empty line."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An `img`: its address made absolute where the page's is known ("" where it has none), and what it says."""

    src: str
    written: str  # the address as the page has it
    alt: str
    width: str  # the attributes, as they are
    height: str


@dataclass(frozen=True, kw_only=True)
class Page:
    items: list[Text | Picture]
    url: str | None  # as given, else the page's own canonical link


class PageError(Exception):
    """The page cannot be read; the message is the reason."""


def read_page(raw: bytes, url: str | None, max_items: int) -> Page:
    """Read a page. Bytes that are UTF-8 are read so, others as the page declares or as browsers would.

    Raises:
        PageError: "html_parse", or "too_many_items" beyond `max_items`.
    """
    try:
        raw.decode()
        encoding: str | None = "utf-8"
    except UnicodeDecodeError:
        encoding = None
    reader = _Reader(url, max_items)
    parser = etree.HTMLParser(target=reader, encoding=encoding, huge_tree=True)
    try:
        parser.feed(raw)
        parser.close()
    except (etree.LxmlError, LookupError, ValueError):
        raise PageError("html_parse") from None
    return Page(items=reader.items, url=reader.url)


class _Reader:
    """The events of the parser; `_skipping` counts the open tags of a part that goes."""

    def __init__(self, url: str | None, max_items: int) -> None:
        self.items: list[Text | Picture] = []
        self.url = url
        self._base = url or ""
        self._max_items = max_items
        self._skipping = 0
        self._head: Literal["none", "open", "left"] = "none"  # open: it is what is skipped, and nothing else
        self._texts: list[str] = []
        self._separator = NOTHING
        self._in_date: list[bool] = []  # for each open tag that is kept and not unwrapped

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag in ("base", "link"):
            self._learn_address(tag, attributes)
        if self._head == "open" and self._skipping == 1 and tag not in HEAD:
            # The parser, which knows HTML 4, has this inside of a head that it made up for a script before it.
            self._skipping, self._head = 0, "left"
        if self._skipping or not self._kept(tag, attributes):
            self._head = "open" if tag == "head" and not self._skipping else self._head
            self._skipping += 1
            self._separator = max(self._separator, SPACE)
        elif tag == "img":
            self._flush()
            self._add(self._picture(attributes))
        elif tag not in UNWRAPPED:
            self._separator = max(self._separator, BREAKS[tag])
            self._in_date.append(tag == "div" and "date" in (attributes.get("class") or ""))

    def end(self, tag: str) -> None:
        if tag == "head" and self._head == "left":
            self._head = "none"
        elif self._skipping:
            self._skipping -= 1
            self._head = "none" if tag == "head" and not self._skipping else self._head
        elif tag != "img" and tag not in UNWRAPPED:
            self._separator = max(self._separator, BREAKS[tag])
            self._in_date.pop()

    def data(self, text: str) -> None:
        if self._skipping or (self._in_date and self._in_date[-1]):
            return
        words = BLANKS.sub(" ", text)
        core = words.strip(" ")
        if not core:
            self._separator = max(self._separator, SPACE if words else NOTHING)
            return
        if words[0] == " ":
            self._separator = max(self._separator, SPACE)
        if self._texts:
            self._texts.append(SEPARATORS[self._separator])
        self._texts.append(core)
        self._separator = SPACE if words[-1] == " " else NOTHING

    def comment(self, text: str) -> None:
        """Comments go."""

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        text = "".join(self._texts).encode("utf-8", "replace").decode().strip()
        self._texts, self._separator = [], NOTHING
        if text:
            self._add(Text(text=text))

    def _add(self, item: Text | Picture) -> None:
        if len(self.items) >= self._max_items:
            raise PageError("too_many_items")
        self.items.append(item)

    def _learn_address(self, tag: str, attributes: dict[str, str]) -> None:
        address = _address(attributes.get("href"))
        if tag == "base" and address:
            self._base = _joined(self._base, address)
        elif address.startswith(("http://", "https://")) and (attributes.get("rel") or "").lower() == "canonical":
            self.url = self.url or address
            self._base = self._base or address

    def _kept(self, tag: str, attributes: dict[str, str]) -> bool:
        classes = attributes.get("class") or ""
        if not BOILERPLATE_CLASSES.isdisjoint(classes.split()) and tag not in ("html", "body"):
            return False
        if tag == "div" and any((attributes.get(name) or "") in BOILERPLATE_NAMES for name in ("id", "class", "title")):
            return False
        return tag == "img" or tag in BREAKS or tag in UNWRAPPED

    def _picture(self, attributes: dict[str, str]) -> Picture:
        written = [_address(attributes.get(name)) for name in SOURCES]
        plain = [a for a in written if a and not a.startswith("data:") and "," not in a and " " not in a]
        chosen = (plain or [a for a in written if a.startswith("data:")] or [""])[0]
        return Picture(
            src=chosen if chosen.startswith("data:") else _joined(self._base, chosen),
            written=chosen,
            **{name: _text(attributes.get(name)) for name in ("alt", "width", "height")},
        )


def _text(value: str | None) -> str:
    return (value or "").encode("utf-8", "replace").decode()


def _address(value: str | None) -> str:
    """An attribute's address; what it holds more than browsers take (a surrogate, blanks around it) is cut."""
    return _text(value).strip()


def _joined(base: str, address: str) -> str:
    try:
        return urljoin(base, address) if address else ""
    except ValueError:  # an IPv6 address that is none
        return address
