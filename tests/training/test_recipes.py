"""Every shipped recipe parses, every DeepSpeed file is whole, and bad recipes are refused in one line."""

import pytest
import yaml

from curation.errors import UserError
from tests.conftest import ROOT
from training.deepspeed_config import deepspeed_config
from training.train import parse

RECIPES = sorted((ROOT / "recipes/train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_recipes_parse_and_fit_every_deepspeed_file(recipe, stage):
    sources = yaml.safe_load(recipe.read_text())["loader"].get("sources", ["data"])
    data = [word for name in sources for word in ("--data", f"{name}=d")]
    config = parse(["--config", str(recipe), *data, "--out", "o", "--deepspeed", f"ds_configs/{stage}.json"])[0]
    settings = deepspeed_config(config, 2)
    assert settings["train_micro_batch_size_per_gpu"] * 2 == config.loader.batch
    assert settings["zero_optimization"]["stage"] == int(stage[4])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optim.learning_rate", "1"], "learning_rate"),
        (["--precision", "fp8"], "precision"),
        (["--config", "recipes/train/none.yaml"], "none.yaml"),
        (["--samples", "10"], "samples"),
        (["--loader.captions", "{txt: 0.5, recaption.txt: 0}"], "loader.captions"),
        (["--loader.captions", "{}"], "loader.captions"),
        (["--loader.captions", "first"], "captions"),
        (["--config", "recipes/train/tiny_vlm2vec.yaml", "--vlm2vec.patch_dropout", "0.5"], "patch_dropout"),
    ],
)
def test_bad_recipes_name_what_is_wrong(arguments, named):
    base = [] if arguments[0] == "--config" else ["--config", "recipes/train/tiny_mmgem.yaml"]
    with pytest.raises(UserError, match=named) as error:
        parse([*base, "--data", "d", "--out", "o", *arguments])
    assert "\n" not in str(error.value)
