"""VLM2Vec: do instructions help where one model serves several tasks? The same pictures, asked in four ways.

Rows are in MMEB-train's form (jobs/reproduce/rows.py), with the instruction in
the query or with the picture alone. Only the query differs between the arms.
"""

import json
from pathlib import Path

from jobs.reproduce.claim import Arm, Claim, Hypothesis, Score
from jobs.reproduce.rows import TASKS
from jobs.reproduce.workshop import HELDOUT, Seed, Workshop

SOURCES = json.dumps({task: {"kind": "rows"} for task in TASKS})


def prepare(workshop: Workshop) -> None:
    shared = workshop.shared
    workshop.synth(shared / "heldout", workshop.size("heldout", least=64), HELDOUT)
    workshop.step("write_rows", shared / "rows.log", shared / "heldout", shared / "rows")


def prepare_seed(seed: Seed) -> None:
    """One tokenizer for both arms, trained on the instructed rows: the same model, and the same initial weights."""
    data = seed.data
    seed.workshop.synth(data / "train", seed.workshop.size("train", least=256), seed.number)
    seed.workshop.step("write_rows", data / "rows.log", data / "train", data / "rows")
    words = [word for task in TASKS for word in ("--data", f"{task}={data}/rows/asked/{task}")]
    seed.workshop.tokenizer(data / "processor", "--config", CLAIM.recipe, "--loader.sources", SOURCES, *words)


def grade(seed: Seed, arm: str, run: Path) -> dict[str, Score]:
    form = "asked" if arm == "instructions" else "plain"
    found = seed.grade("grade_rows", arm, run, seed.workshop.shared / "rows" / form)
    scores = {task: found[f"{task}_hit_at_1"] for task in TASKS}
    value, chance = (sum(score[k] for score in scores.values()) / len(scores) for k in (0, 1))
    return {"mean": Score(value, chance), **scores}


CLAIM = Claim(
    title="Instructions help across mixed tasks",
    source="VLM2Vec, arXiv 2410.05160, section 4.3",
    says="A model that is told what to find scores higher, on average over four tasks on the same pictures, than one "
    "that sees the pictures alone.",
    recipe="recipes/train/tiny_vlm2vec.yaml",
    sizes={"samples": 20_480, "train": 4_000, "heldout": 1_000},
    overrides=(
        "--loader.batch", "64", "--loader.sources", SOURCES, "--loader.cache_decoded", "false",
        "--vlm2vec.processor", "{data}/processor",
        "--objective.duplicates", "masked",
    ),
    arms={
        "instructions": Arm(
            says="picture and instruction", data=tuple(f"{task}={{data}}/rows/asked/{task}" for task in TASKS)
        ),
        "no instructions": Arm(
            says="the picture alone", data=tuple(f"{task}={{data}}/rows/plain/{task}" for task in TASKS)
        ),
    },
    hypotheses=(Hypothesis(metric="mean", arm="instructions", against="no instructions"),),
    why=(
        "hit@1 of each query among the distinct answers of its own task, as MMEB grades, and the mean of the four "
        "tasks. A model without instructions is not lost: what is a colour and what is a number the candidates say.",
        "Rows of one answer are no negatives of each other, in both arms.",
        "A Qwen2-VL of 1.3 million weights from scratch, which has to learn to read the instructions too; the paper's "
        "backbones could read before.",
    ),
    prepare=prepare,
    prepare_seed=prepare_seed,
    grade=grade,
    shown=("mean", *TASKS),
    minutes=28,
)  # fmt: skip
