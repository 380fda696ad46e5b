"""Figures in the docs are those of the committed results, and only what is between the marks is written."""

import json
from pathlib import Path

import pytest

from benchmarks import claims, cost, pages
from benchmarks.case import LATEST
from benchmarks.run import in_markdown


@pytest.mark.parametrize(
    ("page", "by", "table"),
    [
        ("speed.md", "benchmarks.run", lambda: in_markdown(json.loads(LATEST.read_text()))),
        ("reproduce.md", "benchmarks.claims", lambda: claims.table(json.loads(claims.RESULTS.read_text()))),
        ("curation.md", "benchmarks.cost", lambda: cost.table(cost.read(LATEST), cost.PAIRS)),
    ],
)
def test_the_pages_have_the_tables_of_the_results(page: str, by: str, table) -> None:  # type: ignore[no-untyped-def]
    assert pages.found(pages.DOCS / page, by) == table(), "python -m benchmarks.run writes both"


def test_what_is_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- by one -->\nold\n<!-- end -->\nbetween\n<!-- by other -->\n<!-- end -->\nafter\n")
    pages.put(page, "other", "| a |\n| b |")
    expected = "<!-- by other -->\n| a |\n| b |\n<!-- end -->\nafter\n"
    assert page.read_text() == "before\n<!-- by one -->\nold\n<!-- end -->\nbetween\n" + expected
    assert pages.found(page, "other") == "| a |\n| b |" and pages.found(page, "one") == "old"
