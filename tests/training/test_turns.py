"""Threads that share one fast tokenizer get what one alone gets, and only in it do they wait for each other."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.training.conftest import flava_config, tiny_config
from tests.training.vlm import mixed_rows, tiny
from training.bottleneck import Timers
from training.families import build
from training.tokenizer import InTurn, take_turns, train_bpe

WORDS = ["a red cube left of a blue ball", "two green cones", "behind a table", "unbelievable balloons"] * 8


def encoded(tokenizer, number):
    """Settings that differ from call to call, as a processor's and a caption's do."""
    if number % 2:
        return tokenizer(WORDS[number % 5 :], padding=True)["input_ids"]
    return tokenizer(WORDS[number % 5 :], truncation=True, max_length=2 + number % 3)["input_ids"]


@pytest.mark.parametrize("again", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_each_thread_gets_what_it_gets_alone(again):
    tokenizer = train_bpe(WORDS, 300)
    expected = [encoded(tokenizer, number) for number in range(30)]
    take_turns(tokenizer)
    tokenizer = again(tokenizer)
    assert isinstance(tokenizer._encode_plus, InTurn)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert list(pool.map(lambda n: encoded(tokenizer, n), range(30))) == expected


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_next"])
def test_rows_become_the_same_chunks_in_many_threads(kind):
    _, inputs, processor = tiny(kind, negatives=2)
    take_turns(processor.tokenizer)
    expected, timers = [inputs.collate(mixed_rows()[n:]) for n in range(4)], Timers()

    def made(number):
        with timers("prepare"):
            return inputs.collate(mixed_rows()[number % 4 :])

    with ThreadPoolExecutor(4) as pool:
        for number, chunk in enumerate(pool.map(made, range(16))):
            assert chunk.keys() == expected[number % 4].keys()
            assert all(torch.equal(x, expected[number % 4][name]) for name, x in chunk.items())
    assert timers.seconds["tokenise"] > 0 and timers.seconds["prepare"] > 0


@pytest.mark.parametrize("config", [tiny_config, flava_config])
def test_families_come_with_a_tokenizer_that_threads_may_share(config, tmp_path):
    assert isinstance(build(config(), tmp_path / "tokenizer", lambda: WORDS).tokenizer._encode_plus, InTurn)
