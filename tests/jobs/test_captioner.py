"""Our own captioner in curation: the words that evaluation's greedy captioning writes, and draws that repeat."""

from pathlib import Path

import pytest
from PIL import Image

from curation.captioner import captioner_content, load_captioner
from curation.errors import UserError
from curation.manifest import write_manifest
from tests.training.conftest import tiny_config, write_shards
from training.config import as_dict
from training.data import Shards
from training.families import build
from training.inference import load


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained MM-GEM, exported as the loop does."""
    folder = tmp_path_factory.mktemp("run")
    shards = write_shards(folder / "shards", [40])
    config = tiny_config()
    family = build(config, folder / "tokenizer", Shards(shards).every_caption)
    family.export(family.model.state_dict(), folder / "export")
    write_manifest(folder / "export" / "gemsmith.json", {"config": as_dict(config), "steps": 0})
    return folder / "export"


def test_an_export_writes_captions_for_curation(export: Path) -> None:
    captioner = load_captioner("jobs.captioner:mmgem", str(export))
    images = [Image.new("RGB", (50, 40), (n * 40, 90, 200 - n * 30)) for n in range(5)]
    pixels = [captioner.pixels(image) for image in images]
    ours = load(export)
    assert captioner.best(pixels, beams=1, min_tokens=0, max_tokens=9) == ours.caption(ours.images(images), 9)
    asked = {"n": 4, "seed": 1, "top_k": 50, "top_p": 0.9, "min_tokens": 5, "max_tokens": 9}
    together = captioner.sampled(pixels, list("abcde"), **asked)
    alone = [captioner.sampled([p], [key], **asked)[0] for p, key in zip(pixels, "abcde")]
    assert together == alone and all(len(texts) == 4 for texts in together)
    assert len({text for texts in together for text in texts}) > 10
    assert captioner_content("jobs.captioner:mmgem", str(export))["model"] != str(export)


def test_what_is_no_export_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--checkpoint|no such folder|manifest"):
        load_captioner("jobs.captioner:mmgem", str(tmp_path / "none"))
