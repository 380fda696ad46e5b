"""Measured figures inside the docs: a table between two marks, the first of which says what prints it."""

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
END = "<!-- end -->\n"


def put(page: Path, by: str, table: str) -> None:
    """Replace the table that `by` printed into the page; a page that has it already keeps its time."""
    text = page.read_text()
    start, end = _between(text, by)
    if text[start:end] != table + "\n":
        page.write_text(f"{text[:start]}{table}\n{text[end:]}")


def found(page: Path, by: str) -> str:
    """The table that `by` printed into the page."""
    text = page.read_text()
    start, end = _between(text, by)
    return text[start:end].rstrip("\n")


def _between(text: str, by: str) -> tuple[int, int]:
    mark = f"<!-- by {by} -->\n"
    start = text.index(mark) + len(mark)
    return start, text.index(END, start)
