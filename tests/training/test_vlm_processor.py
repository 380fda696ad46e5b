"""What a recipe says to a backbone's own processor holds, or is refused: transformers would leave it out silently."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from curation.errors import UserError
from tests.conftest import ROOT
from tests.training.test_recipes import config_of
from tests.training.vlm import LLAVA, tiny
from training.family_config import Vlm2VecRecipe
from training.models.vlm2vec import recipe_processor
from training.models.vlm_inputs import Inputs, Item

PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
"""preprocessor_config.json of Qwen/Qwen2-VL-2B-Instruct, which has no processor_config.json."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone's config and tokenizer, with the processor as Qwen2-VL's is published."""
    model, _, processor = tiny("qwen2_vl")
    where = tmp_path_factory.mktemp("qwen")
    model.backbone.config.save_pretrained(where)
    processor.tokenizer.save_pretrained(where)
    (where / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return where


def tokens(folder, settings, *size):
    """How many tokens a picture of this (width, height) takes."""
    recipe = Vlm2VecRecipe(name_or_path=str(folder), processor_settings=settings)
    processor, config = recipe_processor(recipe, None, list)
    side = Inputs(processor, config, max_tokens=16).side([Item(image=Image.new("RGB", size))])
    found = int((side["input_ids"] == config.image_token_id).sum())
    assert found == int(side["image_grid_thw"].prod()) // 4
    return found


def test_v2_s_recipe_bounds_a_picture_as_its_authors_do(folder):
    """Their smart_resize, written out: 28 pixels a token's side, at most 1,280 tokens and at least 4."""
    settings = config_of(ROOT / "recipes/train/vlm2vec_qwen2vl_lora.yaml").vlm2vec.processor_settings
    assert settings == {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 1280}
    width, height = 2800, 1400
    assert tokens(folder, {}, width, height) == 100 * 50
    shrunk = np.sqrt(width * height / (28 * 28 * 1280))
    wanted = int(width / shrunk / 28) * int(height / shrunk / 28)
    assert tokens(folder, settings, width, height) == wanted and 1200 < wanted <= 1280
    assert tokens(folder, settings, 20, 20) == 4 and tokens(folder, settings | {"min_pixels": 28 * 28 * 9}, 20, 20) == 9


def test_a_run_s_own_processor_takes_the_settings_again(folder, tmp_path):
    recipe = Vlm2VecRecipe(name_or_path=str(folder), processor_settings={"max_pixels": 28 * 28 * 16})
    processor, _ = recipe_processor(recipe, None, list)
    processor.save_pretrained(tmp_path)
    again, _ = recipe_processor(recipe, tmp_path, list)
    plain = transformers.AutoProcessor.from_pretrained(tmp_path)
    shown = [Image.new("RGB", (300, 200), "red")]
    one, two, three = (p.image_processor(images=shown, return_tensors="pt") for p in (processor, again, plain))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert torch.equal(one["pixel_values"], three["pixel_values"]) and len(one["pixel_values"]) <= 16 * 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resize_max_pixels": 1003520}, "resize_max_pixels: Qwen2VLProcessor has no such setting .*max_pixels, merge"),
        ({"max_pixels": 1003520, "longest_edge": 64}, "longest_edge: Qwen2VLProcessor has no such setting"),
        (
            {"size": {"shortest_edge": 64, "longest_edge": 1003520}},
            r"size: stays .*12845056.* wins; write min_pixels and max_pixels",
        ),
    ],
)
def test_a_setting_that_would_change_nothing_is_one_line(folder, settings, said):
    recipe = Vlm2VecRecipe(name_or_path=str(folder), processor_settings=settings)
    with pytest.raises(UserError, match=rf"^vlm2vec\.processor_settings\.{said}") as error:
        recipe_processor(recipe, None, list)
    assert "\n" not in str(error.value)


def test_settings_of_other_kinds_hold(folder, tmp_path):
    """Of the tokenizer, of the processor itself, a size by one number; the same as before is no error."""
    same = {"merge_size": 2, "image_mean": PUBLISHED["image_mean"], "model_max_length": 77, "revision": "main"}
    recipe = Vlm2VecRecipe(name_or_path=str(folder), processor_settings=same)
    assert recipe_processor(recipe, None, list)[0].tokenizer.model_max_length == 77
    model, _, processor = tiny("llava_next")
    model.backbone.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = {"size": 24, "vision_feature_select_strategy": "full", "do_convert_rgb": True}
    found, _ = recipe_processor(Vlm2VecRecipe(name_or_path=str(tmp_path), processor_settings=settings), None, list)
    assert dict(found.image_processor.size) == {"shortest_edge": 24}
    with pytest.raises(UserError, match=r"min_pixels: LlavaNextProcessor has no such setting"):
        recipe_processor(Vlm2VecRecipe(name_or_path=str(tmp_path), processor_settings={"min_pixels": 9}), None, list)
    with pytest.raises(UserError, match=r"^vlm2vec\.processor_settings: a backbone from scratch"):
        Vlm2VecRecipe(backbone=LLAVA, processor_settings={"size": 24})
