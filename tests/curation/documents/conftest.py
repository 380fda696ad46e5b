"""A pool of web pages as they are found: a travel blog, a recipe, a shop, a forum, broken and hostile ones."""

import base64
import json
from pathlib import Path

import pytest

from tests.curation.conftest import picture, write_tar

PROSE = [
    "The harbour of the old town is at its best in the early morning, when the boats come back and the gulls follow.",
    "We had walked down from the hotel before breakfast, and the man who sells coffee was still setting up.",
    "It is not a large place, but there is more to see than one would think from the road that leads past it.",
    "On the other side of the bay, a path goes up to the lighthouse, and from there you can see as far as the islands.",
    "If you stay for a second night, ask for the room at the back, which is quieter and has a view of the garden.",
    "Most of the houses were built by sailors who had seen other countries, and no two of them are painted alike.",
    "In the evening we went to the small restaurant near the church, where the owner told us about the storm.",
    "There was only one dish on the menu, and it was as good as anything that we have eaten on this coast.",
]
BOILERPLATE = (
    "Subscribe to our newsletter and follow us on Facebook and Twitter, or share this post on Pinterest by email."
)


def page(title: str, body: str, head: str = "") -> bytes:
    return f"""<!DOCTYPE html><html><head><title>{title}</title>{head}<style>p {{color: red}}</style>
<script>var a = "<p>this is no text of the page</p>";</script></head>
<body><div id="header"><img src="/img/banner.jpg"><a href="/">Home of this site and all that is in it</a></div>
<nav><ul><li>About</li></ul></nav>{body}
<div class="site footer">All of this is the property of the owner of the site.</div></body></html>""".encode()


def blog(n: int) -> str:
    first, second, third = (PROSE[(n + i) % len(PROSE)] + f" That was number {n} of our walks." for i in range(3))
    return f"""<article><h1>A walk of the kind that we like, number {n}</h1><div class="post-date">June 3, 2021</div>
<p>{first}</p><figure><img src="photo{n}.jpg" alt="boats &amp; gulls" width="640" height="480">
<figcaption>Boats in the harbour.</figcaption></figure>
<p>{second}<br>{third}</p><img src="/img/site-logo.png"><img src="thumb.jpg"><p>{BOILERPLATE}</p>
<p>© 2021</p>
<p>This paragraph is the same on every page that the site has, and it is not about the walk.</p></article>"""


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve blog posts of one site, saved with their pictures, and pages with something wrong."""
    root = tmp_path_factory.mktemp("pages")
    site = root / "walks.example"
    (root / "img").mkdir()
    site.mkdir()
    (root / "img" / "site-logo.png").write_bytes(picture(1, (200, 200), "PNG"))
    (site / "thumb.jpg").write_bytes(picture(2, (100, 80)))
    for n in range(12):
        (site / f"post{n:02}.html").write_bytes(page(f"Walk {n}", blog(n)))
        (site / f"photo{n}.jpg").write_bytes(picture(100 + n, (320, 240)))
    (site / "post12.html").write_bytes((site / "post03.html").read_bytes())  # the same page again
    (site / "empty.html").write_bytes(b"")
    (site / "no_pictures.html").write_bytes(page("Text", "".join(f"<p>{text} And more.</p>" for text in PROSE)))
    german = "Der Hafen der alten Stadt ist am frühen Morgen am schönsten, wenn die Boote zurückkommen."
    (site / "german.html").write_bytes(page("Hafen", f"<p>{german}</p><img src=photo1.jpg><p>{german} Ja.</p>"))
    (site / "outside.html").write_bytes(page("Out", f"<p>{PROSE[0]} Out.</p><img src='../../../../etc/passwd'>"))
    (site / "latin.html").write_bytes("<meta charset=latin-1><p>caf\xe9<img src=photo1.jpg>".encode("latin-1"))
    (site / "photo99.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (site / "broken.html").write_bytes(
        page("Broken", f"<p>{PROSE[4]} So.<b><div><p>{PROSE[5]} Yes.<img src=photo99.jpg>")
    )
    inline = base64.b64encode(picture(300, (200, 180))).decode()
    (site / "inline.html").write_bytes(
        page(
            "Inline",
            f"<p>{PROSE[6]} Inline.</p><img src='data:image/jpeg;base64,{inline}'><p>{PROSE[7]} Inline too.</p>",
        )
    )
    return root


def sentence_document(n: int, pictures: int = 2) -> dict[str, bytes]:
    """A document in MMC4's layout with its pictures, as the members of a tar's sample."""
    info = [{"image_name": f"p{i}.jpg", "raw_url": f"https://example.org/{n}/{i}.jpg"} for i in range(pictures)]
    said = {
        "text_list": [f"{text} It is text {n}." for text in PROSE[n % 3 : n % 3 + 4]],
        "image_info": info,
        "url": f"https://example.org/{n}.html",
    }
    return {
        "json": json.dumps(said).encode(),
        **{f"p{i}.jpg": picture(1000 + 10 * n + i, (200, 160)) for i in range(pictures)},
    }


@pytest.fixture(scope="session")
def sentence_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars and a jsonl file in MMC4's layout."""
    root = tmp_path_factory.mktemp("sentences")
    for shard in range(2):
        found = {f"{n:04}": sentence_document(n, 1 + n % 7) for n in range(shard * 6, shard * 6 + 6)}
        write_tar(root / f"{shard}.tar", found)
    write_tar(root / "2.tar", {"bad": {"json": b"{"}, "list": {"json": b"[1]"}, "odd": {"json": b'{"text_list": [1]}'}})
    (root / "pictures").mkdir()
    (root / "pictures" / "a.jpg").write_bytes(picture(5000, (200, 160)))
    line = {"text": " ".join(PROSE[:3]), "image_info": [{"image_name": "pictures/a.jpg"}, {"image_name": "none.jpg"}]}
    (root / "lines.jsonl").write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "text": "One. Two."}) + "\n")
    return root
