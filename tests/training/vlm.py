"""Tiny vision-language backbones of real kinds, their real processors, and rows of every mix; shared by tests."""

import numpy as np
import torch
from PIL import Image

from tests.conftest import ROOT
from training.config import ObjectiveConfig
from training.family_config import Vlm2VecRecipe
from training.models.vlm2vec import Vlm2Vec, recipe_config
from training.models.vlm_inputs import Inputs, Item, Row, instruct
from training.models.vlm_processor import build_processor, build_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
QWEN = {
    "model_type": "qwen2_vl",
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
    "vision_config": {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
    },
}  # fmt: skip
LLAVA = {
    "model_type": "llava_next",
    "text_config": {"model_type": "mistral", **TEXT},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    },
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}
QWEN25 = {
    "model_type": "qwen2_5_vl",
    "text_config": QWEN["text_config"],
    "vision_config": {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 32,
        "window_size": 16, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
BACKBONES = {"qwen2_vl": QWEN, "qwen2_5_vl": QWEN25, "llava_next": LLAVA}
RECIPE = ["--config", str(ROOT / "recipes/train/tiny_vlm2vec.yaml"), "--data", ".", "--out", ".", "--precision", "fp32"]
RECIPE += ["--loader.batch", "16", "--loader.chunk", "4", "--loader.retain", "0", "--loader.decode_size", "32"]
RECIPE += ["--vlm2vec.tokenizer.vocab_size", "300"]
RECIPE += ["--loader.cache_decoded", "false", "--samples", "16", "--deepspeed", str(ROOT / "ds_configs/zero3.json")]
ADAPTER = ["--adapter.module", "backbone", "--adapter.r", "4"]
CAPTIONS = ["a red cube left of a blue ball", "two green cones behind a table", "Instruct: Query: find the caption"]


def tiny(kind, padding_side="left", negatives=0, seed=0, **recipe):
    """(model, inputs, processor) of a tiny backbone."""
    torch.manual_seed(seed)
    settings = Vlm2VecRecipe(backbone=BACKBONES[kind], negatives=negatives, **recipe)
    tokenizer = build_tokenizer(CAPTIONS, 300, kind)
    config = recipe_config(settings, tokenizer)
    processor = build_processor(config, tokenizer)
    processor.tokenizer.padding_side = padding_side
    model = Vlm2Vec.from_recipe(settings, config, ObjectiveConfig(temperature=0.02))
    with torch.no_grad():  # from scratch all states are nearly one: embeddings that differ make a test sharp
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(4.0 if "embed" in name or "proj" in name else 1.0)
    return model.eval(), Inputs(processor, config, max_tokens=40, negatives=negatives), processor


def picture(number, size=(20, 14)):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def mixed_rows(negatives=2):
    """Rows of every mix: pictures of several sizes on either side, texts alone, a hole, 0 to `negatives` negatives."""
    task = "find the caption."
    rows = [
        Row(query=Item(text=instruct(task, image=True), image=picture(1)), positive=Item(text="a red cube")),
        Row(query=Item(text=instruct(task, "ball")), positive=Item(text="a longer text of a blue ball, a table")),
        None,
        Row(query=Item(text="two cones"), positive=Item(image=picture(2, (33, 12)))),
        Row(query=Item(image=picture(3, (12, 30))), positive=Item(text=instruct("x", "y", True), image=picture(4))),
        Row(query=Item(text="a"), positive=Item(text="b")),
        Row(query=Item(text=instruct(task, "table", True), image=picture(5, (16, 16))), positive=Item(text="a table")),
    ]
    extra = [Item(text="a red ball"), Item(text="behind", image=picture(6)), Item(text="green")]
    return [
        Row(query=r.query, positive=r.positive, negatives=extra[i % 2 :][: i % (negatives + 1)]) if r else None
        for i, r in enumerate(rows)
    ]


def assert_alone_as_padded(model, inputs):
    """A row's embedding is the same whether it stands alone or is padded beside others."""
    items = [item for row in mixed_rows() if row for item in (row.query, row.positive)]
    with torch.no_grad():
        together = model.embed(inputs.side(items))[: len(items)]
        alone = torch.cat([model.embed(inputs.side([item], picture=False)) for item in items])
    assert inputs.side(items)["attention_mask"].min() == 0, "some rows are padded"
    assert (together - alone).abs().max() < 1e-5
    assert torch.pdist(together).min() > 1e-3, "the rows differ, so that a wrong position would show"
