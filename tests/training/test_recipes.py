"""Every shipped recipe parses, every DeepSpeed file is whole, and bad recipes are refused in one line."""

import pytest

from curation.errors import UserError
from tests.conftest import ROOT
from training.deepspeed_config import deepspeed_config
from training.train import parse

RECIPES = sorted((ROOT / "recipes/train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_recipes_parse_and_fit_every_deepspeed_file(recipe, stage):
    config = parse(["--config", str(recipe), "--data", "d", "--out", "o", "--deepspeed", f"ds_configs/{stage}.json"])[0]
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
    ],
)
def test_bad_recipes_name_what_is_wrong(arguments, named):
    base = [] if arguments[0] == "--config" else ["--config", "recipes/train/tiny_mmgem.yaml"]
    with pytest.raises(UserError, match=named) as error:
        parse([*base, "--data", "d", "--out", "o", *arguments])
    assert "\n" not in str(error.value)


def test_deepspeed_files_are_checked(tmp_path):
    file = tmp_path / "ds.json"
    config = parse(
        ["--config", "recipes/train/tiny_mmgem.yaml", "--data", "d", "--out", "o", "--deepspeed", str(file)]
    )[0]
    with pytest.raises(UserError, match=r"deepspeed.*ds\.json does not exist"):
        deepspeed_config(config, 2)
    file.write_text('{"bf16": {"enabled": true}}')
    with pytest.raises(UserError, match="bf16"):
        deepspeed_config(config, 2)
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        deepspeed_config(config, 2)
    with pytest.raises(UserError, match="3 ranks"):
        deepspeed_config(parse(["--config", "recipes/train/tiny_mmgem.yaml", "--data", "d", "--out", "o"])[0], 3)
