"""The graphs that a step holds, counted by saved-tensor hooks, against the memory given for them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_cost_rows import saved_peak
from curation.errors import UserError
from tests.training.conftest import flava_config, tiny_config, write_shards
from training.config import LoaderConfig
from training.data import Loader, Shards, Source
from training.distributed import World
from training.families import build
from training.flops import FlopMeter
from training.gradient_cache import Outputs, gradient_cached_step
from training.loop import settle_retention
from training.objectives import build as build_objective
from training.retention import GIB, room_of, saved_bytes

CHUNK, BATCH = 8, 32


def settled(folder, gib):
    """What a run has once it has settled how many samples it retains: one rank, without an engine."""
    auto = ("--loader.retain", "auto", "--loader.retain_gib", str(gib))
    config = tiny_config(*auto, "--loader.captions", "random", "--loader.max_tokens", "24")
    plain = Shards(write_shards(folder / "plain", [96]))
    family = build(config, folder / "tokenizer", plain.every_caption)

    # Captions of the first chunk are short; of the others one in ten is long.
    first = loader_of(config, family, plain).ids(0)[:CHUNK]
    captions = lambda n: [" ".join(["word"] * (30 if n % 10 == 3 and f"{n:06d}" not in first else 2))]  # noqa: E731
    return trainer_of(config, family, Shards(write_shards(folder / "data", [96], captions=captions)))


def loader_of(config, family, sources):
    more = {"extra": family.extra, "mismatched": family.mismatched}
    return Loader(sources, config.loader, family.image, family.encode_text, seed=0, rank=0, world_size=1, **more)


def trainer_of(config, family, sources):
    trainer = SimpleNamespace(
        config=config,
        loader=loader_of(config, family, sources),
        family=family,
        world=World(),
        last=None,
        flops=FlopMeter(),
        engine=SimpleNamespace(device=torch.device("cpu"), zero_optimization_stage=lambda: 0),
        forward=lambda chunk, separable: Outputs(**family.model(chunk, separable=separable)),
    )
    settle_retention(trainer)
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
            counts={name: sum(model.counts(c).get(name, 0.0) for c in chunks) for name in model.separable},
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
    assert room / 3 < max(found) <= room, "texts are shorter than they may be"
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


def test_every_kind_of_a_mixture_fits(tmp_path):
    """Batches of texts come first, and take far less than those of pairs."""
    streams = "{texts: {kind: texts}, images: {kind: images}, pairs: {kind: pairs}}"
    words = ["--loader.sources", streams, "--data", "texts=.", "--data", "images=.", "--data", "pairs=."]
    words += ["--loader.batch", str(BATCH), "--loader.unit", str(BATCH), "--loader.mixing", "round_robin"]
    words += [
        "--loader.chunk",
        str(CHUNK),
        "--loader.retain",
        "auto",
        "--loader.retain_gib",
        "1",
        "--precision",
        "fp32",
    ]
    config, data = flava_config(*words), Shards(write_shards(tmp_path / "data", [96]))
    sources = [Source(name=kind, samples=data, kind=kind) for kind in ("texts", "images", "pairs")]
    family = build(config, tmp_path / "tokenizer", data.every_caption)
    family.prepare(sources)
    parameters = list(family.model.parameters())
    takes = [
        saved_bytes(lambda c=c: family.model(c, separable=True), parameters)
        for c in loader_of(config, family, sources).of_each_kind()
    ]
    assert takes[2] > 1.5 * max(takes[:2])

    room = 2.5 * takes[2]
    given = dataclasses.replace(config.loader, retain_gib=room / GIB)
    trainer = trainer_of(dataclasses.replace(config, loader=given), family, sources)
    assert CHUNK < trainer.loader.retain < BATCH
    found = [held(trainer, chunks) for chunks in trainer.loader.batches(0, 6)]
    print({"retain": trainer.loader.retain, "room": room, "held": found})
    assert room / 3 < max(found) <= room, "captions are shorter than they may be"


def test_what_gradients_will_take_of_a_gpu_is_not_given_to_graphs():
    auto = LoaderConfig(retain="auto")
    assert room_of(auto, 50 * GIB, 10 * GIB) == pytest.approx(0.8 * 40 * GIB)
    assert room_of(auto, 5 * GIB, 10 * GIB) == 0
    assert room_of(dataclasses.replace(auto, retain_gib=3.0), 50 * GIB, 10 * GIB) == 3 * GIB
    with pytest.raises(UserError, match=r"loader\.retain_gib: is needed beside"):
        room_of(auto, None, 10 * GIB)
