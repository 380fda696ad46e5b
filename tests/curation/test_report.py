"""The page: complete, self-contained, and safe against what captions hold."""

import html.parser
import re
from pathlib import Path

import pytest

from curation.config import parse_config
from curation.pipeline import curate


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, pool: Path, recipe: dict[str, object], ray_here: None) -> str:
    out = tmp_path_factory.mktemp("report") / "out"
    selectors = {**recipe["selectors"], "caption_rules": {"kind": "caption_rules", "min_words": 30}}  # type: ignore[dict-item]
    only = {name: selectors[name] for name in ("language", "copies", "caption_rules")}
    curate(parse_config({**recipe, "selectors": only}), pools=[str(pool)], out=out, workers=1)
    return (out / "report" / "index.html").read_text()


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    found = Page(page)
    assert not [t for t, _ in found.tags if t in {"script", "link", "iframe", "object"}]
    sources = [a["src"] for t, a in found.tags if t == "img"]
    assert len(sources) > 12 and all(s and s.startswith("data:image/") for s in sources)
    assert not re.search(r"url\(|@import", page)


def test_it_names_every_stage_and_reason(page: str) -> None:
    text = " ".join(Page(page).text)
    for word in ("readable", "language", "copies", "caption_rules", "json_parse", "image_decode", "140", "clip_score"):
        assert word in text


def test_captions_are_escaped(tmp_path: Path, recipe: dict[str, object], ray_here: None) -> None:
    from tests.curation.conftest import sample, write_tar

    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{ 7 * 7 }}"
    write_tar(tmp_path / "pool" / "0.tar", {str(n): sample(n, txt=hostile.encode()) for n in range(3)})
    curate(
        parse_config({"signals": recipe["signals"]}), pools=[str(tmp_path / "pool")], out=tmp_path / "out", workers=1
    )
    found = Page((tmp_path / "out" / "report" / "index.html").read_text())
    assert hostile in found.text
    assert not [t for t, a in found.tags if t == "script" or "onerror" in a]
