"""Every shipped recipe parses, with the signals that its selectors need, and says at its top where it comes from."""

import json
from pathlib import Path

import pytest
import yaml

from curation.config import load_config, parse_config
from tests.conftest import ROOT

MADE_FIRST = {  # what these name is trained before
    "tiny_demo": ["--signals.clip_score.model", "ViT-B-32-quickgelu"],
    "dfn": ["--signals.dfn_score.model", "ViT-B-32-quickgelu"],
}
RECIPES = sorted((ROOT / "recipes" / "curate").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses_and_introduces_itself(path: Path) -> None:
    config = load_config(path, MADE_FIRST.get(path.stem, []))
    text = path.read_text()
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 120
    raw = yaml.safe_load(text)
    assert list(config.signals) == list(raw["signals"]) and list(config.selectors) == list(raw["selectors"])
    assert "seed" in raw
    assert parse_config(yaml.safe_load(json.dumps(config.to_dict()))) == config


def test_all_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert {"datacomp_basic", "datacomp_clip_l14_f30", "datacomp_text_based", "datacomp_image_based"} <= names
    assert {"datacomp_image_based_clip", "laion2b", "metaclip_400m", "semdedup", "cat", "licences"} <= names
    assert {"tmars", "sieve", "dfn", "recaption"} <= names
