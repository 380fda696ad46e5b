"""Pages to sequences: what a reader sees, in order, whatever the markup; hostile pages in linear time."""

import time
from html import escape

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curation.documents.html import PageError, Picture, Text, read_page


def shape(markup: str | bytes, url: str | None = None) -> list[str]:
    """Texts as they are, pictures as <address>."""
    raw = markup.encode() if isinstance(markup, str) else markup
    items = read_page(raw, url, 1000).items
    return [item.text if isinstance(item, Text) else f"<{item.src}>" for item in items]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<p>One <b>bold</b> word<i>s</i>.</p>", ["One bold words."]),
        ("<p>a</p><p>b</p>", ["a\n\nb"]),
        ("<div>a</div><div>b</div>", ["a\nb"]),
        ("<div><p>a</p></div><div>b</div>", ["a\n\nb"]),
        ("a<br>b <br/> c", ["a\nb\nc"]),
        ("<p>a\n  b\t c</p>", ["a b c"]),
        ("<p>a<!-- not\n\nthis -->b</p>", ["ab"]),
        ("<p>a</p><img src=x.jpg><p>b</p>", ["a", "<x.jpg>", "b"]),
        ("<p>a <a href=big.jpg><img src=x.jpg></a> b", ["a", "<x.jpg>", "b"]),
        ("<figure><img src=x.jpg><figcaption>said</figcaption></figure>", ["<x.jpg>", "said"]),
        ("<picture><source srcset='x.webp 2x'><img src=x.jpg></picture>", ["<x.jpg>"]),
        ("<p>a<wbr>b<hr>c<embed src=x><input>d<track>", ["abcd"]),
        ("<svg><path d=x /><g/></svg><button>b</button>a<iframe>x</iframe><object><p>o</object>", ["a"]),
        ("<p>a<script>if (a<b) {'<p>x</p>'}</script><style>p{}</style>b", ["a b"]),
        ("<p>a</p><ul><li>menu</li></ul><table><td>cell</table><form>x</form><p>b", ["a\n\nb"]),
        ("<head><title>T</title></head><body>a</body>", ["a"]),
        ("<nav>n</nav><header>h</header>a<footer>f</footer>", ["a"]),
        ('<div id="nav">n<div>m</div></div><div class="menu">m</div>a<div title="footer">f</div>', ["a"]),
        ('<p class="x footer y">f</p><section class="site-info">s</section>a<span class="more-link">m</span>', ["a"]),
        ('<div class="post-date">June<p>kept</p></div>', ["kept"]),
        ("<template><p>t</p></template><noscript><img src=n.jpg></noscript>a", ["a"]),
        ("<p>&amp; &lt;b&gt; &eacute; &#x41;", ["& <b> é A"]),
        ("<p>a<p>b<div>c", ["a\n\nb\n\nc"]),
        ("</div></p>a</b><<>>", ["a<<>>"]),
        ("", []),
    ],
)
def test_what_stays_of_markup(markup: str, expected: list[str]) -> None:
    assert shape(markup) == expected


@pytest.mark.parametrize(
    ("attributes", "src"),
    [
        ("src=a.jpg data-src=b.jpg", "a.jpg"),
        ("src='data:image/gif;base64,R0lG' data-src=b.jpg", "b.jpg"),  # the placeholder of a lazy loader
        ("src='data:image/gif;base64,R0lG'", "data:image/gif;base64,R0lG"),
        ("srcset='a.jpg 1x, b.jpg 2x' data-lazy=c.jpg", "c.jpg"),
        ("srcset=only.jpg", "only.jpg"),
        ("alt=nothing", ""),
        ("src='  a.jpg\n'", "a.jpg"),
    ],
)
def test_the_address_of_a_picture(attributes: str, src: str) -> None:
    assert shape(f"<img {attributes}>") == [f"<{src}>"]


def test_addresses_become_absolute() -> None:
    assert shape("<img src=../a.jpg>", "https://x.example/b/c.html") == ["<https://x.example/a.jpg>"]
    canonical = "<head><link rel=canonical href='https://x.example/b/c.html'></head>"
    assert shape(canonical + "<img src=a.jpg>") == ["<https://x.example/b/a.jpg>"]
    assert read_page(canonical.encode(), None, 10).url == "https://x.example/b/c.html"
    assert read_page(canonical.encode(), "https://given.example/", 10).url == "https://given.example/"
    assert shape("<base href='https://cdn.example/p/'><img src=a.jpg>") == ["<https://cdn.example/p/a.jpg>"]
    assert shape("<base href='http://[bad'><img src='//[x/a.jpg'>") == ["<//[x/a.jpg>"]


def test_what_a_picture_says_is_kept() -> None:
    (found,) = read_page(b"<img src=a.jpg alt='a &quot;b&quot;' width=640 height='50%'>", None, 10).items
    assert isinstance(found, Picture)
    assert (found.alt, found.width, found.height, found.written) == ('a "b"', "640", "50%", "a.jpg")


def test_encodings() -> None:
    assert shape("<p>café") == ["café"]
    assert shape("<meta charset=iso-8859-1><p>caf\xe9".encode("latin-1")) == ["café"]
    assert shape("<p>caf\xe9".encode("utf-16")) == ["café"]
    assert shape(b"<meta charset=no-such-thing><p>caf\xe9")[0].startswith("caf")
    assert all(text.encode() is not None for text in shape(b"<p>\xff\xfe\x00\xd8 &#xd800; \x00"))


@pytest.mark.parametrize(
    "hostile", ["<div>" * 100_000 + "x", "<b>" * 100_000, "<p><b>" * 50_000, "<" * 500_000, "<!--" * 100_000]
)
def test_hostile_pages_take_linear_time(hostile: str) -> None:
    began = time.process_time()
    read_page(hostile.encode(), None, 1_000_000)
    assert time.process_time() - began < 20  # the square of the size would be minutes


def test_too_many_items() -> None:
    with pytest.raises(PageError, match="too_many_items"):
        read_page(b"<img src=a.jpg>" * 11, None, 10)


WORD = st.text("abcdefghij<>&\"' é漢", min_size=1, max_size=12).filter(str.strip)
BLOCK = st.one_of(
    st.tuples(st.just("text"), WORD, st.sampled_from(["p", "div", "h2", "blockquote", "section"])),
    st.tuples(st.just("picture"), st.integers(0, 99).map(lambda n: f"{n}.jpg"), st.just("img")),
    st.tuples(st.just("gone"), WORD, st.sampled_from(["script", "nav", "table", "form", "li", "svg", "footer"])),
)


@settings(deadline=None)
@example([("gone", "x", "script"), ("text", "first", "section"), ("gone", "x", "nav"), ("text", "a b", "p")], False)
@example([("gone", "x", "script"), ("gone", "x", "svg"), ("text", "first", "section")], False)
@given(st.lists(BLOCK, max_size=30), st.booleans())
def test_order_is_kept_and_nothing_is_lost(blocks: list[tuple[str, str, str]], nested: bool) -> None:
    markup, expected = "", []
    for kind, value, tag in blocks:
        if kind == "picture":
            markup += f"<img src={value}>"
            expected.append(value)
        else:
            markup += f"<{tag}>{escape(value) if tag != 'script' else 'x()'}</{tag}>"
            expected += value.split() if kind == "text" else []
    found: list[str] = []
    for item in shape(f"<div><div>{markup}</div></div>" if nested else markup):
        found += [item[1:-1]] if item.endswith(".jpg>") else item.split()
    assert found == expected
