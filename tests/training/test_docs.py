"""The pages of the families: each has the shapes along its path, and the file that holds each is there and says so."""

import re

import pytest

from tests.conftest import ROOT

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("models", "vlm2vec")}
FAMILIES = {
    "models": ("MM-GEM", "Stage 2: regions", "CLIP and SigLIP", "CoCa", "NegCLIP", "LiMBeR and MAPL", "FLAVA"),
    "vlm2vec": ("Shapes",),
}
PLACE = re.compile(r"`(training/[\w/]+\.py)` `(\w+)`")


@pytest.mark.parametrize(("page", "family"), [(page, family) for page, names in FAMILIES.items() for family in names])
def test_a_family_has_its_shapes_and_each_is_where_the_table_says(page, family):
    (section,) = re.findall(rf"^##+ {family}[^\n]*\n(.*?)(?=^##+ |\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    (rows,) = re.findall(r"\| along the path \| shape \| file \|\n\|---\|---\|---\|\n((?:\|[^\n]*\n)+)", section)
    lines = rows.splitlines()
    assert len(lines) >= 4 and all(PLACE.search(line) for line in lines)
    for file, name in PLACE.findall(rows):
        text = (ROOT / file).read_text()
        assert re.search(rf'(def|class) {name}\b|"{name}"', text), f"{file} has no {name}"
