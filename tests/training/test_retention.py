"""The graphs that a step holds, counted by saved-tensor hooks, against the memory given for them."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_cost_rows import saved_peak
from curation.errors import UserError
from tests.training.conftest import tiny_config, write_shards
from training.data import Loader, Shards
from training.distributed import World
from training.families import build
from training.flops import FlopMeter
from training.gradient_cache import Outputs, gradient_cached_step
from training.loop import settle_retention
from training.objectives import build as build_objective
from training.retention import GIB, saved_bytes

CHUNK, BATCH = 8, 32


def settled(folder, gib):
    """What a run has once it has settled how many samples it retains: one rank, without an engine."""
    auto = ("--loader.retain", "auto", "--loader.retain_gib", str(gib))
    config = tiny_config(*auto, "--loader.captions", "random", "--loader.max_tokens", "24")
    plain = Shards(write_shards(folder / "plain", [96]))
    family = build(config, folder / "tokenizer", plain.every_caption)

    def loader_of(shards):
        return Loader(shards, config.loader, family.image, family.encode_text, seed=0, rank=0, world_size=1)

    first = loader_of(plain).ids(0)[:CHUNK]  # their captions are short; of the others one in ten is long
    captions = lambda n: [" ".join(["word"] * (30 if n % 10 == 3 and f"{n:06d}" not in first else 2))]  # noqa: E731
    loader = loader_of(Shards(write_shards(folder / "data", [96], captions=captions)))
    trainer = SimpleNamespace(
        config=config,
        loader=loader,
        family=family,
        world=World(),
        flops=FlopMeter(),
        engine=SimpleNamespace(device=torch.device("cpu")),
        forward=lambda chunk, separable: Outputs(**family.model(chunk, separable=separable)),
    )
    settle_retention(trainer, None)
    return trainer


def held(trainer, chunks) -> int:
    """Bytes at most during a step."""
    model = trainer.family.model
    model.zero_grad()

    def step(coupled):
        gradient_cached_step(
            forward=trainer.forward,
            backward=lambda loss: loss.backward(),
            chunks=chunks,
            counts={"generate": sum(model.counts(c)["generate"] for c in chunks)},
            weights={},
            coupled=coupled,
            world=trainer.world,
            retain=True,
        )

    return saved_peak(step, build_objective(trainer.config.objective), model.parameters())


@pytest.mark.parametrize("gib", [0.003, 0.004])
def test_graphs_never_take_more_than_they_are_given(tmp_path, gib):
    trainer = settled(tmp_path, gib)
    loader, room = trainer.loader, gib * GIB
    assert CHUNK < loader.retain < BATCH
    batches = list(loader.batches(0, 6))
    assert {len(chunks[0]["valid"]) for chunks in batches} == {loader.retain}
    found = [held(trainer, chunks) for chunks in batches]
    print({"retain": loader.retain, "room": room, "held": found})
    assert room / 2 < max(found) <= room
    loader.longest, loader.retain = True, loader.retain + 1
    (more, *_), *_ = loader.batches(0, 1)
    parameters = list(trainer.family.model.parameters())
    assert saved_bytes(lambda: trainer.forward(more, True), parameters) > room, "one more would not fit"


def test_less_than_a_chunk_needs_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"loader\.retain_gib: 0\.0001 is less than the .* GiB .* a chunk of 8"
    ) as error:
        settled(tmp_path, 0.0001)
    assert "\n" not in str(error.value)
