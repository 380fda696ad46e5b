"""The command line: its flags are a contract, and what a user gets wrong is one line, exit code 2, nothing touched."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from curation.manifest import claim
from jobs.cli import COMMANDS
from tests.conftest import ROOT, gemsmith

FLAGS = {
    "synth": "--clean --help --layout --out --overwrite --pairs --seed --workers",
    "curate": "--config --dry-run --help --out --overwrite --part --phase --pool --ray.address --signals --workers",
    "documents": "--config --help --out --overwrite --pool --ray.address --workers",
    "neighbours": "--column --help --k --shards --signals",
    "inspect": "--help --out",
    "share": "--help --layout --out --signal --to",
    "export": "--checkpoint --dtype --help --merge --out --overwrite --trust-remote-code",
    "evaluate": "--cache --checkpoint --data --embed-tokens --help --out --tasks --threads --trust-remote-code",
    "heatmap": "--checkpoint --help --image --out --text",
    "watch": "--best --cache --data --help --idle-seconds --out --run --tasks --threads --trust-remote-code",
    "search": "--batch --checkpoint --data --help --image --out --threads --top --trust-remote-code",
    "compare": "--a-checkpoint --b-checkpoint --help",
    "report": "--help",
    "demo": "--help --out --overwrite --seed",
    "reproduce": "--help --out --overwrite --scale --seeds --workers",
}
SETTINGS = """
--batch --captioning --captioning.bootstrap --captioning.fixed_captions --captioning.limit --captioning.max_new_tokens
--classification --classification.bootstrap --classification.limit --config --print_config
--region_captioning --region_captioning.bootstrap --region_captioning.limit --region_captioning.max_new_tokens
--region_retrieval --region_retrieval.bootstrap --region_retrieval.k --region_retrieval.limit
--retrieval --retrieval.bootstrap --retrieval.captions --retrieval.k --retrieval.limit
"""
"""Of the commands that grade, beside their flags."""
TRAIN_FLAGS = """
--activation_checkpointing --adapter --background_save --checkpoint_every --clip --config --data --deepspeed --help
--flava
--keep_last --loader --loader.batch --loader.cache_decoded --loader.cache_dir --loader.cache_gib --loader.captions
--loader.chunk --loader.color_jitter --loader.color_jitter_prob --loader.crop_scale --loader.decode_size
--loader.error_window --loader.flip --loader.gray_scale_prob --loader.max_error_rate --loader.max_tokens
--loader.mixing --loader.prefetch --loader.resize_mode --loader.retain --loader.retain_gib --loader.sources
--loader.threads --loader.unit --loader.window_shards --log_every --mmgem --objective --objective.coupled
--objective.directions --objective.duplicates --objective.gather --objective.logit_bias --objective.reduction
--objective.temperature --objective.temperature_ceiling --objective.temperature_end --objective.temperature_floor
--objective.temperature_schedule --objective.tile --objective.weights --optim --optim.betas --optim.eps
--optim.gradient_clipping --optim.groups --optim.lr --optim.name --optim.schedule --optim.warmup_steps
--optim.weight_decay --out --overwrite --precision --ranks --samples --seed --vlm2vec
"""


def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", gemsmith(command, "--help").stdout))


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_flags_of_a_command_are_frozen(command: str) -> None:
    settings = SETTINGS.split() if "--tasks" in FLAGS[command] else []
    assert sorted(flags_of(command)) == sorted(FLAGS[command].split() + settings)


def test_train_keeps_its_flags() -> None:
    """Recipes gain settings; those that recipes and scripts out there use stay."""
    assert set(TRAIN_FLAGS.split()) - flags_of("train") == set()


def test_help_names_every_command() -> None:
    said = gemsmith("--help").stdout
    assert set(COMMANDS) == {*FLAGS, "train"}
    assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in COMMANDS)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def refused(place: Path, *arguments: object) -> str:
    """The message of a refused command; nothing below `place` was made, changed or removed."""
    before = contents(place)
    done = gemsmith(*arguments, check=False)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert contents(place) == before
    return lines[0].removeprefix("error: ")


CURATE = ["curate", "--config", "recipes/curate/flickr8k.yaml"]
TRAIN = ["train", "--config", "recipes/train/tiny_mmgem.yaml"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (["--sed", "3"], "recipe.sed"),
        (["--selectors.resolution.mim=3"], "selectors.resolution.mim"),
        (["--selectors.new.kind", "nonsense"], "nonsense"),
        (["--seed", "many"], "seed"),
        (["--part", "5/4", "--phase", "measure"], "--part 5/4"),
        (["--part", "1/4"], "--part 1/4"),
    ],
)
def test_a_bad_setting_of_curate(override: list[str], named: str, raw_pool: Path, tmp_path: Path) -> None:
    assert named in refused(tmp_path, *CURATE, "--pool", raw_pool, "--out", tmp_path / "out", *override)


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_an_unknown_key_of_train(where: str, raw_pool: Path, tmp_path: Path) -> None:
    recipe, words = tmp_path / "recipe.yaml", []
    written = yaml.safe_load((ROOT / "recipes/train/tiny_mmgem.yaml").read_text())
    if where == "recipe":
        written["loader"]["bach"] = 4
    else:
        words = ["--loader.bach", "4"]
    recipe.write_text(yaml.safe_dump(written))
    said = refused(tmp_path, "train", "--config", recipe, "--data", raw_pool, "--out", tmp_path / "run", *words)
    assert "bach" in said


def test_what_does_not_exist(raw_pool: Path, tmp_path: Path) -> None:
    none, out = tmp_path / "none", tmp_path / "out"
    assert f"--pool {none}" in refused(tmp_path, *CURATE, "--pool", none, "--out", out)
    assert f"--config {none}" in refused(tmp_path, "curate", "--config", none, "--pool", raw_pool, "--out", out)
    assert f"--data {none}" in refused(tmp_path, *TRAIN, "--data", none, "--out", out)
    grade = ["--tasks", "retrieval", "--data", raw_pool, "--out", out]
    assert f"--checkpoint {none}" in refused(tmp_path, "evaluate", "--checkpoint", none, *grade)
    assert f"--checkpoint {none}" in refused(tmp_path, "search", "--checkpoint", none, "--data", raw_pool, "words")
    assert f"--data {none}" in refused(tmp_path, "search", "--checkpoint", none, "--data", none, "words")
    assert "nonsense" in refused(tmp_path, "nonsense")
    assert str(none) in refused(tmp_path, "compare", none, none)


@pytest.mark.parametrize(
    "command",
    [
        lambda pool, out: [*CURATE, "--pool", pool, "--out", out],
        lambda pool, out: [*TRAIN, "--data", pool, "--out", out],
        lambda pool, out: ["synth", "--pairs", "10", "--out", out],
    ],
    ids=["curate", "train", "synth"],
)
@pytest.mark.parametrize("holds", ["another run", "somebody's files"])
def test_an_output_folder_of_another_run(
    command: Callable[[Path, Path], list[object]], holds: str, raw_pool: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if holds == "another run":
        claim(out, {"seed": 4711})
    else:
        out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    said = refused(tmp_path, *command(raw_pool, out))
    assert f"--out {out}" in said
    if holds == "another run":
        assert "--overwrite" in said
    else:  # not even --overwrite takes what is nobody's
        refused(tmp_path, *command(raw_pool, out), "--overwrite")


def test_a_checkpoint_cut_short(raw_pool: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"half of a checkp")
    grade = ["--tasks", "retrieval", "--data", raw_pool, "--out", tmp_path / "results.jsonl"]
    said = refused(tmp_path, "evaluate", "--checkpoint", step, *grade)
    assert str(step) in said and "manifest.json" in said
    files = {"zero_pp_rank_0_mp_rank_00_model_states.pt": 4096}
    (step / "manifest.json").write_text(json.dumps({"schema_version": 1, "step": 10, "files": files}))
    said = refused(tmp_path, "evaluate", "--checkpoint", step, *grade)
    assert "16 bytes of 4096" in said
