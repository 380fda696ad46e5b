"""The tiny recipes as they stand: trained on any folder of pairs (and one of regions), and graded.

What targets are held to (test_recipe_targets.py) and what photographs show
(test_recipes_on_photographs.py) is one run of the same commands. Some recipes
begin from a run of another, which is made once.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation import results
from jobs.steps import precision
from tests.conftest import ROOT, gemsmith

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes/train").glob("tiny_*.yaml"))}
GRADED = {
    **dict.fromkeys(
        ("tiny_clip", "tiny_negclip", "tiny_siglip", "tiny_flava", "tiny_vlm2vec"), ("retrieval", "classification")
    ),
    **dict.fromkeys(("tiny_mmgem", "tiny_coca"), ("retrieval", "classification", "captioning")),
    "tiny_demo": ("retrieval", "captioning"),
    **dict.fromkeys(("tiny_limber", "tiny_mapl"), ("captioning",)),
    "tiny_mmgem_stage2_captioning": ("region_captioning",),
    "tiny_mmgem_stage2_retrieval": ("region_retrieval", "region_captioning"),
}
"""By what a recipe is graded, where it is not by retrieval alone."""
SAMPLES = os.environ.get("GEMSMITH_SAMPLES")
"""So many in place of a recipe's own: a rehearsal."""


def graded(name: str) -> tuple[str, ...]:
    return GRADED.get(name, ("retrieval",))


class Runs:
    """Trains recipes in FOLDER, each once, on PAIRS or, for those of stage 2, on REGIONS."""

    def __init__(self, folder: Path, pairs: Path, regions: Path) -> None:
        self.folder, self.pairs, self.regions = folder, pairs, regions
        self.known: dict[str, tuple[Path, float]] = {}

    def __call__(self, name: str) -> tuple[Path, float]:
        """The recipe's run, and the minutes that it took."""
        if name not in self.known:
            data = self.regions if "stage2" in name else self.pairs
            words = ["train", "--config", RECIPES[name], "--data", data, "--out", self.folder / name]
            words += [*self._beginning(name), *(["--samples", SAMPLES] if SAMPLES else [])]
            begun = time.monotonic()
            gemsmith(*words, "--ranks", 2, "--precision", precision(), timeout=3600)
            self.known[name] = self.folder / name, (time.monotonic() - begun) / 60
        return self.known[name]

    def _export(self, name: str) -> Path:
        return self(name)[0] / "export"

    def _bridge(self) -> list[object]:
        from training.models.mmgem import MMGem

        if not (language := self.folder / "lm").exists():
            MMGem.from_pretrained(self._export("tiny_mmgem")).llm.save_pretrained(language)
        words = ["--mmgem.vision.arch", f"local-dir:{self._export('tiny_clip')}"]
        words += ["--mmgem.language.name_or_path", language]
        return [*words, "--mmgem.tokenizer.name_or_path", self("tiny_mmgem")[0] / "tokenizer"]

    def _beginning(self, name: str) -> list[object]:
        """Words that say which runs a recipe begins from."""
        begins: dict[str, Callable[[], list[object]]] = {
            "tiny_demo": lambda: ["--mmgem.vision.arch", f"local-dir:{self._export('tiny_clip')}"],
            "tiny_limber": self._bridge,
            "tiny_mapl": self._bridge,
            "tiny_mmgem_stage2_captioning": lambda: ["--mmgem.init", self._export("tiny_mmgem")],
            "tiny_mmgem_stage2_retrieval": lambda: ["--mmgem.init", self._export("tiny_mmgem_stage2_captioning")],
        }
        return begins.get(name, list)()


def grade(
    name: str, run: Path, scenes: Mapping[str, Path], out: Path, recipe: Path = ROOT / "recipes/evaluate/tiny_demo.yaml"
) -> dict[str, dict[str, Any]]:
    """{task.metric: row} of a run, graded on what `scenes` has for its tasks; printed with intervals."""
    tasks = [task for task in graded(name) if task in scenes]
    words = ["--checkpoint", run / "export", "--tasks", ",".join(tasks), "--out", out]
    words += [word for task in tasks for word in ("--data", f"{task}={scenes[task]}")]
    words += ["--region_captioning.limit", 1000]  # targets were set by so many, and more take their time
    gemsmith("evaluate", *words, "--config", recipe, timeout=1800)
    rows = {f"{row['task']}.{row['metric']}": row for row in results.read(out)}
    for figure, row in rows.items():
        low, high = row["ci95"]
        chance = "" if row["chance"] is None else f", chance {row['chance']:.4g}"
        print(f"{name}: {figure} {row['value']:.4f}, 95 % [{low:.4f}, {high:.4f}], n {row['n']}{chance}")
    return rows
