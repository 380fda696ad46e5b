"""The tiny recipes, as they are, on photographs that nobody drew: 3,000 of Flickr8k to train on and 1,000 to be graded
on; for regions 80 of COCO and 20.

    pytest -m long -s -k tiny_clip tests/jobs/test_recipes_on_photographs.py

prints what each reaches. Held: that it runs, and finds pictures and captions it has not seen better than chance. (A
stage 2 of 80 photographs is held to nothing more than running.)
"""

import tarfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs.tiny_recipes import RECIPES, SAMPLES, Runs, grade

REGIONS_TRAINED_ON = 80


@pytest.fixture(scope="module")
def regions(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """COCO's photographs with boxes in two folders."""
    folder = tmp_path_factory.mktemp("regions")
    parts = {"train": folder / "train", "heldout": folder / "heldout"}
    for part in parts.values():
        part.mkdir()
    with (
        tarfile.open(photographs / "coco_boxes/00000.tar") as tar,
        tarfile.open(parts["train"] / "00000.tar", "w") as train,
        tarfile.open(parts["heldout"] / "00000.tar", "w") as heldout,
    ):
        for member in tar:
            (train if int(Path(member.name).stem) < REGIONS_TRAINED_ON else heldout).addfile(
                member, tar.extractfile(member)
            )
    return parts


@pytest.fixture(scope="module")
def trained(photographs: Path, regions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("photographs"), photographs / "flickr8k/train", regions["train"])


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_recipe_learns_from_photographs(
    name: str, trained: Runs, photographs: Path, regions: dict[str, Path], tmp_path: Path
) -> None:
    scenes = dict.fromkeys(("retrieval", "captioning"), photographs / "flickr8k/dev")
    scenes |= dict.fromkeys(("region_retrieval", "region_captioning"), regions["heldout"])
    run, minutes = trained(name)
    print(f"\n{name}: {minutes:.2f} minutes")
    rows = grade(name, run, scenes, tmp_path / "results.jsonl", ROOT / "recipes/evaluate/flickr8k.yaml")
    assert rows
    if not SAMPLES:
        for way in ("image_to_text", "text_to_image"):
            if found := rows.get(f"retrieval.{way}_recall@10"):
                assert found["ci95"][0] > found["chance"], f"{way}: {found['value']:.4f}"
