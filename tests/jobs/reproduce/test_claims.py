"""What makes a claim's comparison fair: its arms differ in what they say they differ in, and begin from the same bits.

Whole claims, at a fiftieth of their sizes, run through the real commands in `make test-long`.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from curation.manifest import write_json
from curation.synth import synthesise
from jobs.reproduce import rows, step
from jobs.reproduce.claims import CLAIMS
from jobs.reproduce.instruct import SOURCES
from jobs.reproduce.run import words_of_training
from jobs.reproduce.workshop import Seed, Workshop
from tests.conftest import ROOT, gemsmith
from training.config import TrainConfig, as_dict
from training.train import parse

DIFFER = {
    "joint": {"objective.weights.generate", "objective.weights.embed"},
    "batch": {"samples", "loader.batch", "loader.chunk", "loader.retain", "optim.lr", "optim.warmup_steps"},
    "instruct": set(),
    "stage2": set(),
    "flava": {
        "samples", "flava.masks.mismatched", "loader.sources.images", "loader.sources.texts",
        *(f"objective.weights.{name}" for name in ("itm", "mim", "mlm", "mmm_image", "mmm_text")),
    },
    "curate": set(),
}  # fmt: skip


def seed_of(name: str, folder: Path) -> Seed:
    return Seed(Workshop(name, CLAIMS[name].sizes, folder, 1.0, lock=0), 3)


def configs(name: str, folder: Path) -> dict[str, tuple[TrainConfig, dict[str, str]]]:
    """(recipe, data) of every arm, as `gemsmith train` reads its words."""
    claim, seed = CLAIMS[name], seed_of(name, folder)
    if name == "stage2":  # what the recipe takes over from the run before
        first = parse(["--config", "recipes/train/tiny_mmgem.yaml", "--data", ".", "--out", "."])[0]
        write_json(seed.data / "captioning" / "export" / "gemsmith.json", {"config": as_dict(first)})
    found = {}
    for arm in (name for name, arm in claim.arms.items() if arm.run is None):
        words = words_of_training(claim, seed, arm)
        where = words.index("--ranks")
        config, data, _, _ = parse(words[1:where] + words[where + 2 :])
        found[arm] = config, data
    return found


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_arms_differ_only_in_what_they_are_about(name: str, tmp_path: Path) -> None:
    assert set(DIFFER) == set(CLAIMS)
    found = configs(name, tmp_path)
    flats = [flat(as_dict(config)) for config, _ in found.values()]
    keys = {
        key for one in flats for key in one if len({json.dumps(other.get(key), default=str) for other in flats}) > 1
    }
    assert {next((d for d in DIFFER[name] if key.startswith(d)), key) for key in keys} == DIFFER[name]
    assert all(config.seed == 3 for config, _ in found.values())
    if name in ("instruct", "curate"):
        assert len({tuple(data.values()) for _, data in found.values()}) == len(found), "then their data differ"


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_hypothesis_is_about_arms_and_metrics_that_there_are(name: str) -> None:
    claim = CLAIMS[name]
    assert claim.hypotheses and set(claim.arms) == {arm for h in claim.hypotheses for arm in (h.arm, h.against)}
    assert {h.metric for h in claim.hypotheses} <= set(claim.shown)
    assert claim.minutes <= 30


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_claim_is_on_the_page_and_in_the_help(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs" / "reproduce.md").read_text()
    assert re.search(rf"\b{name}\b.*; or all", gemsmith("reproduce", "--help").stdout.replace("\n", " "))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clean pools of other scenes, `a` and `b`."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, name in enumerate("ab"):
        synthesise(out=folder / name, pairs=40, seed=number, noise=False, workers=1)
    return folder


def prepare(name: str, scenes: Path, folder: Path) -> None:
    """What the arms of a claim share, made as its `prepare` does, of a few scenes."""
    data, shared = seed_of(name, folder).data, folder / "shared"
    shutil.copytree(scenes / "a", data / "train")
    recipe = ("--config", CLAIMS[name].recipe)
    if name == "instruct":
        rows.write_rows(data / "train", data / "rows")
        words = [word for task in rows.TASKS for word in ("--data", f"{task}={data}/rows/asked/{task}")]
        step.make_tokenizer(str(data / "processor"), *recipe, "--loader.sources", SOURCES, *words)
    elif name == "flava":
        step.make_tokenizer(str(data / "tokenizer"), *recipe, "--data", str(data / "train"))
        for stream in ("pictures", "texts"):
            shutil.copytree(scenes / "b", data / stream)
    elif name == "curate":
        step.make_tokenizer(str(shared / "tokenizer"), *recipe, "--data", str(data / "train"))
        for arm, pool in (("curated", "a"), ("raw", "b")):
            shutil.copytree(scenes / pool, shared / arm / "shards")


@pytest.mark.parametrize("name", ["joint", "instruct", "flava", "curate"])  # those of batch are read from one folder
def test_arms_of_a_seed_begin_from_the_same_weights(name: str, scenes: Path, tmp_path: Path) -> None:
    import torch

    from training.data import every_caption, open_sources
    from training.families import build

    prepare(name, scenes, tmp_path)
    states = {}
    for arm, (config, data) in configs(name, tmp_path).items():
        sources = open_sources(config.loader, data)
        family = build(config, tmp_path / arm / "tokenizer", lambda sources=sources: every_caption(sources))
        states[arm] = family.model.state_dict()
    (first, *others) = states.values()
    for other in others:
        assert set(first) == set(other)
        assert all(torch.equal(first[key], other[key]) for key in first)
    other_seed = dataclasses.replace(config, seed=4)
    again = build(other_seed, tmp_path / arm / "tokenizer", lambda: ()).model.state_dict()
    assert any(not torch.equal(first[key], again[key]) for key in first), "another seed, other weights"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_claim_in_small_through_the_real_commands(name: str, tmp_path: Path) -> None:
    gemsmith("reproduce", name, "--out", tmp_path, "--seeds", 2, "--scale", 0.02, timeout=1700)
    summary = json.loads((tmp_path / f"{name}.json").read_text())
    claim = CLAIMS[name]
    assert set(summary["arms"]) == set(claim.arms)
    for hypothesis, test in zip(claim.hypotheses, summary["tests"], strict=True):
        assert test["hypothesis"] == dataclasses.asdict(hypothesis)
        for arm in (hypothesis.arm, hypothesis.against):
            assert len(summary["arms"][arm][hypothesis.metric]) == 2
    assert not summary["holds"], "a rehearsal"
    assert claim.title in (tmp_path / "index.html").read_text()
    again = gemsmith("reproduce", name, "--out", tmp_path, "--seeds", 2, "--scale", 0.02)
    assert json.loads((tmp_path / f"{name}.json").read_text())["arms"] == summary["arms"], again.stdout
