"""What a tiny recipe says it reaches on the embedded scenes, and in what time, held by running it as it is.

    # target: retrieval.text_to_image_recall@1 >= 0.2        a row of `gemsmith evaluate`: its task and metric
    # target: minutes <= 5                                   of `gemsmith train --ranks 2`, on two quiet cores

All figures of a recipe are printed (`pytest -m long -s -k tiny_clip tests/jobs/test_recipe_targets.py`); one without
targets is measured too, and skipped. GEMSMITH_SAMPLES=512 rehearses: no target is held then.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from evaluation import results
from evaluation.tasks import TASKS
from jobs.steps import precision
from tests.conftest import ROOT, gemsmith

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes/train").glob("tiny_*.yaml"))}
LINE = re.compile(r"# target: (minutes|\w+\.[\w@]+) (>=|<=) (\d+(?:\.\d+)?)")
GRADED = {
    **dict.fromkeys(("tiny_coca", "tiny_mmgem", "tiny_demo"), ("retrieval", "captioning")),
    **dict.fromkeys(("tiny_limber", "tiny_mapl"), ("captioning",)),
    **dict.fromkeys(
        ("tiny_mmgem_stage2_captioning", "tiny_mmgem_stage2_retrieval"), ("region_retrieval", "region_captioning")
    ),
}
"""By what a recipe is graded, where it is not by retrieval alone."""
SAMPLES = os.environ.get("GEMSMITH_SAMPLES")


def targets_of(text: str) -> dict[str, tuple[str, float]]:
    """{figure: (sign, bound)} of the lines of a recipe that set one."""
    found = {}
    for line in text.splitlines():
        if line.startswith("# target"):
            match = LINE.fullmatch(line)
            assert match, f"{line}: write `# target: TASK.METRIC >= VALUE`, or minutes <= N"
            found[match[1]] = match[2], float(match[3])
    return found


def missed(targets: Mapping[str, tuple[str, float]], figures: Mapping[str, float]) -> list[str]:
    """The targets that the figures do not reach, in words."""
    return [
        f"{name} {sign} {bound:g}, found {figures[name]:.4g}"
        for name, (sign, bound) in targets.items()
        if not (figures[name] >= bound if sign == ">=" else figures[name] <= bound)
    ]


def test_a_target_is_read_and_a_miss_is_named() -> None:
    text = "# A recipe.\n# target: retrieval.text_to_image_recall@1 >= 0.25\n# target: minutes <= 3\nsamples: 1\n"
    found = targets_of(text)
    assert found == {"retrieval.text_to_image_recall@1": (">=", 0.25), "minutes": ("<=", 3.0)}
    figures = {"retrieval.text_to_image_recall@1": 0.25, "minutes": 3.0, "retrieval.more": 0.0}
    assert missed(found, figures) == []
    assert missed(found, figures | {"minutes": 3.01}) == ["minutes <= 3, found 3.01"]
    assert len(missed(found, {"retrieval.text_to_image_recall@1": 0.2, "minutes": 9.0})) == 2
    for line in ("# target: recall >= 0.2", "# target: minutes < 3", "# targets: minutes <= 3"):
        with pytest.raises(AssertionError, match="write `# target"):
            targets_of(line)


@pytest.mark.parametrize("name", RECIPES)
def test_targets_are_of_what_is_graded(name: str) -> None:
    targets = targets_of(RECIPES[name].read_text())
    graded = GRADED.get(name, ("retrieval",))
    assert set(graded) <= set(TASKS) and {target.split(".")[0] for target in targets} <= {"minutes", *graded}
    assert not targets or ("minutes" in targets and len(targets) > 1), "what is reached, and in what time"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """name -> (the recipe's run, minutes that it took); a run that others begin from is made once."""
    folder = tmp_path_factory.mktemp("targets")
    known: dict[str, tuple[Path, float]] = {}
    gemsmith("synth", "--clean", "--out", folder / "train", "--pairs", 6_000, "--seed", 1)

    def export(name: str) -> Path:
        return run(name)[0] / "export"

    def bridge() -> list[object]:
        from training.models.mmgem import MMGem

        if not (language := folder / "lm").exists():
            MMGem.from_pretrained(export("tiny_mmgem")).llm.save_pretrained(language)
        words = ["--mmgem.vision.arch", f"local-dir:{export('tiny_clip')}", "--mmgem.language.name_or_path", language]
        return [*words, "--mmgem.tokenizer.name_or_path", run("tiny_mmgem")[0] / "tokenizer"]

    begins: dict[str, Callable[[], list[object]]] = {
        "tiny_demo": lambda: ["--mmgem.vision.arch", f"local-dir:{export('tiny_clip')}"],
        "tiny_limber": bridge,
        "tiny_mapl": bridge,
        "tiny_mmgem_stage2_captioning": lambda: ["--mmgem.init", export("tiny_mmgem")],
        "tiny_mmgem_stage2_retrieval": lambda: ["--mmgem.init", export("tiny_mmgem_stage2_captioning")],
    }

    def run(name: str) -> tuple[Path, float]:
        if name not in known:
            words = ["train", "--config", RECIPES[name], "--data", folder / "train", "--out", folder / name]
            words += [*begins.get(name, list)(), *(["--samples", SAMPLES] if SAMPLES else [])]
            begun = time.monotonic()
            gemsmith(*words, "--ranks", 2, "--precision", precision(), timeout=3600)
            known[name] = folder / name, (time.monotonic() - begun) / 60
        return known[name]

    return run


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "heldout"
    gemsmith("synth", "--clean", "--out", folder, "--pairs", 1_000, "--seed", 2)
    return folder


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_recipe_reaches_its_targets(name: str, trained, heldout: Path, tmp_path: Path) -> None:
    run, minutes = trained(name)
    out = tmp_path / "results.jsonl"
    tasks = ",".join(GRADED.get(name, ("retrieval",)))
    grading = ["--checkpoint", run / "export", "--tasks", tasks, "--data", heldout, "--out", out]
    gemsmith("evaluate", *grading, "--config", ROOT / "recipes/evaluate/tiny_demo.yaml", timeout=1800)
    figures = {f"{row['task']}.{row['metric']}": row["value"] for row in results.read(out)} | {"minutes": minutes}
    print(json.dumps({name: {key: round(value, 4) for key, value in figures.items()}}))
    targets = targets_of(RECIPES[name].read_text())
    if not targets or SAMPLES:
        pytest.skip(f"{name}: {'a rehearsal' if SAMPLES else 'no target yet'}; minutes {minutes:.1f}")
    assert not (short := missed(targets, figures)), "; ".join(short)
