"""An adapter's gradients on two ZeRO-3 ranks against one plain process that sees the whole batch."""

import pytest

from tests.training.conftest import vlm2vec_config
from tests.training.plain import assert_a_plain_step
from tests.training.ranks import launched
from tests.training.step import chunks_of
from tests.training.test_adapters import moved
from tests.training.vlm import ADAPTER
from training import adapters
from training.data import Shards
from training.families import build


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("vera", "dora"))])
def test_two_ranks_equal_one_plain_process(shards, tmp_path, kind):
    """Float32, real launcher; the adapter begins away from zero, so that every part of it has a gradient."""
    run, begin = tmp_path / "run", tmp_path / "begin"
    target = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    chosen = [f"--adapter.kind={kind}", f"--adapter.target_modules={target}"]
    captions = Shards(shards).every_caption
    config = vlm2vec_config(*ADAPTER, *chosen)
    family = build(config, run / "vlm2vec" / "tokenizer", captions)
    moved(family.model)
    adapters.export(family.model, config.adapter, begin)
    chosen.append(f"--adapter.init_from={begin / adapters.FOLDER}")

    saved, _ = launched(shards, run, "3", "vlm2vec", *ADAPTER, *chosen)
    config = vlm2vec_config(*ADAPTER, *chosen)
    family = build(config, run / "vlm2vec" / "tokenizer", captions)
    chunks = chunks_of(shards, family, config)
    exact = assert_a_plain_step(saved, family.model, chunks, config.objective)
    assert all(g.any() for g in exact.values())
