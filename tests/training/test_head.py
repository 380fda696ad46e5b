"""FLAVA's heads over vocabularies: logits never exist whole, and adapters leave them alone."""

import pytest
import torch

from curation.errors import UserError
from tests.training.conftest import flava_config
from training.families import build
from training.models.flava import Flava, FlavaConfig
from training.models.head import Head

CAPTIONS = ["a red dog", "two blue cats in the park"]
HEADS = ("mim_head", "mmm_image_head", "mlm_head", "mmm_text_head")


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
def test_whole_logits_are_never_made(kind):
    """What a vocabulary of 8,192 adds to the bytes that autograd saves, against those of its logits."""
    b, n, saved = 48, 16, {}
    generator = torch.Generator().manual_seed(0)
    codes, ids = (torch.randint(0, 16, (b, n), generator=generator) for _ in range(2))
    mask = torch.ones(b, n, dtype=torch.bool)
    pictures = {"pixel_values": torch.randn(b, 3, 32, 32), "image_mask": mask, "image_labels": codes}
    texts = {"input_ids": ids, "attention_mask": mask.long(), "masked_ids": ids, "text_labels": ids}
    chunk = {"images": {}, "texts": texts, "pairs": {**texts, "itm_labels": torch.ones(b, dtype=torch.long)}}[kind]
    chunk = chunk if kind == "texts" else {**chunk, **pictures}
    for vocabulary in (16, 8192):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        image = {**sizes, "image_size": 32, "patch_size": 8, "vocab_size": vocabulary}
        text = {**sizes, "vocab_size": vocabulary, "max_position_embeddings": n}
        model = Flava(FlavaConfig(image_config=image, text_config=text, multimodal_config=sizes, embed_dim=8))
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes_of = {}  # of every storage, once

        def pack(x, held=held, sizes_of=sizes_of):
            if (storage := x.untyped_storage()).data_ptr() not in held:
                sizes_of[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sums = model(chunk, separable=True)["sums"]
        saved[vocabulary] = sum(sizes_of.values())
        sum(sums.values()).backward()
    logits = 4 * 8192 * b * n * (2 if kind == "pairs" else 1)
    assert saved[16] > 0 and saved[8192] - saved[16] < logits / 8, (saved, logits)


def test_adapters_leave_the_heads_alone(tmp_path):
    adapted = build(flava_config("--adapter", "{module: ''}"), tmp_path / "tokenizer", lambda: CAPTIONS).model
    assert all(type(getattr(adapted, name).decoder) is Head for name in HEADS)
    assert type(adapted.itm_head.seq_relationship) is not torch.nn.Linear, "it is adapted"
    with pytest.raises(UserError, match=r"adapter\.target_modules: mim_head\.decoder gives a loss"):
        build(
            flava_config("--adapter", "{module: '', target_modules: '.*decoder'}"),
            tmp_path / "tokenizer",
            lambda: CAPTIONS,
        )
