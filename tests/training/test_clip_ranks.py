"""CLIP, SigLIP and CoCa, with hard negatives and half the patches: two ranks under ZeRO-3 against one plain process."""

import pytest
import torch

from tests.training.conftest import FAMILIES
from tests.training.plain import assert_a_plain_step
from tests.training.ranks import launch
from tests.training.step import chunks_of
from training.families import build

KINDS = ("clip", "siglip", "coca")
OVERRIDES = ("--loader.batch", "24", "--loader.chunk", "4", "--loader.retain", "0", "--precision", "fp32")
OVERRIDES += ("--clip.negatives", "1", "--clip.patch_dropout", "0.5")


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("ranks")
    launch("rank_gradients.py", 2, shards, run, "3", ",".join(KINDS), *OVERRIDES)
    return torch.load(run / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_plain_process(shards, saved, kind, tmp_path):
    config = FAMILIES[kind](*OVERRIDES)
    family = build(config, tmp_path / "tokenizer", list)
    (batch,) = chunks_of(shards, family, config, 24)
    assert int(batch["right_valid"][:, 1].sum()) > 0 and saved[kind]["chunks"] == 3
    assert batch["patches"].shape == (24, 8)
    assert_a_plain_step(saved[kind], family.model, [batch], config.objective)
