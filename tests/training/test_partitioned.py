"""A model built a parameter at a time begins from the bits of the ordinary build, in a part of its memory."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.conftest import tiny_config
from tests.training.rank_partitioned import LAYERS, WIDTH, deep
from tests.training.ranks import launch
from tests.training.resident import Resident
from training.data import Shards
from training.families import build
from training.family_config import TokenizerConfig
from training.partitioned import Deferred
from training.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def ranks(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("partitioned")
    words = len(load_tokenizer(TokenizerConfig(vocab_size=320), Shards(shards).every_caption))
    settings = {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": words}
    config = LlamaConfig(hidden_size=2048, intermediate_size=5120, **settings)
    LlamaForCausalLM(config).save_pretrained(run / "llm")  # its matrices are of 40 MiB
    launch("rank_partitioned.py", 2, shards, run, run / "llm")
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_two_ranks_begins_from_the_same_bits(ranks, shards, precision):
    found = torch.load(ranks / "beginnings.pt", weights_only=True)[precision]
    model = build(tiny_config(), ranks / "tokenizer", Shards(shards).every_caption).model
    expected = dict((model.bfloat16() if precision == "bf16" else model).named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name].float()), name


def test_what_is_given_back_reaches_the_system():
    """128 MiB in matrices of 4, each drawn with its masks: glibc may keep what is freed of less than 32."""
    deep(1, 1024)
    with Resident() as seen:
        with (deferred := Deferred()):
            parts = deep(32, 1024)
        for parameter in parts.parameters():
            with deferred.values(parameter):
                assert parameter.any()
    whole = 32 * 4
    print(seen.most, deferred.peak)
    assert deferred.peak < 0.1 * whole * 2**20 and seen.most < 0.4 * whole


def test_no_rank_holds_the_whole(ranks):
    """288 MiB on two ranks: half of it, and what building takes for one parameter of 36 MiB at a time (itself, and as
    much again for the masks that it is drawn with). So, too, where the parameters are those of a mapped file."""
    for rank in (0, 1):
        figures = json.loads((ranks / f"memory_{rank}.json").read_text())
        print(figures)
        whole = LAYERS * WIDTH * WIDTH * 4 / 2**20
        assert figures["same"] and figures["tracked"] < 0.15 * whole and figures["built"] < 0.4 * whole
        assert figures["parts"] < 0.85 * whole and figures["mapped"] < 0.85 * whole


def test_no_rank_holds_the_whole_of_what_is_loaded(ranks):
    """About 300 MiB on two ranks: while it is built some matrices, of 40 MiB, and what glibc keeps of smaller ones;
    half of it once it is cut up; and the bits of the whole load."""
    for rank in (0, 1):
        figures = json.loads((ranks / f"named_{rank}.json").read_text())
        print(figures)
        assert figures["same"] and figures["whole"] > 0.75 * figures["size"] > 225
        assert figures["built"] < 0.5 * figures["size"] and figures["cut_up"] < 0.85 * figures["size"]
