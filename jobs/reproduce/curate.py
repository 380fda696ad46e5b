"""DataComp: does filtering beat volume at equal compute? The demo's pool and commands (jobs/demo.py), smaller.

One pool, one scorer and one curation serve all seeds, since they are the
expensive part: a seed is another initialisation and another order of the same
two sets of shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.demo import DemoSizes, Story, curate_arms, make_data, make_scorer, tokenizer
from jobs.reproduce.claim import Arm, Claim, Hypothesis, Score
from jobs.reproduce.joint import retrieval_scores
from jobs.reproduce.workshop import HELDOUT, Seed, Workshop


@dataclass(slots=True, kw_only=True)
class Work(Story):
    """The demo's story with its steps in the workshop."""

    workshop: Workshop

    def run(self, name: str, *command: object, beside: Sequence[object] | None = None, threads: int = 1) -> None:
        assert beside is None
        self.workshop.run(self.out / "log", *command, threads=threads)


def prepare(workshop: Workshop) -> None:
    """Pool, trusted pairs, scorer, shards of both arms, and one tokenizer for both."""
    size = workshop.size
    sizes = DemoSizes(
        pool=size("pool", least=600), trusted=size("trusted", least=300), reference=size("reference", least=100),
        heldout=size("heldout", least=64), classes=16, scorer_samples=size("scorer_samples", least=512),
    )  # fmt: skip
    work = Work(workshop.shared, HELDOUT, sizes, workshop=workshop)
    make_data(work)
    make_scorer(work)
    curate_arms(work)
    tokenizer(work)


def prepare_seed(seed: Seed) -> None:
    """Nothing of its own: all seeds train on the shared shards."""


def grade(seed: Seed, arm: str, run: Path) -> dict[str, Score]:
    heldout = seed.workshop.shared / "heldout"
    return retrieval_scores(seed.evaluate(arm, run, "retrieval", heldout, "--retrieval.captions", "first"))


CLAIM = Claim(
    title="Filtering beats volume at equal compute",
    source="DataComp, arXiv 2304.14108, section 5",
    says="A model that sees a filtered part of a raw pool several times retrieves better than one that sees the whole "
    "pool for the same number of samples.",
    recipe="recipes/train/tiny_mmgem.yaml",
    recipes=(
        "recipes/train/tiny_clip.yaml", "recipes/train/tiny_demo.yaml", "recipes/curate/tiny_demo.yaml",
        "recipes/curate/tiny_raw.yaml", "jobs/demo.py",
    ),
    sizes={
        "samples": 20_480, "pool": 8_000, "trusted": 4_000, "reference": 800, "heldout": 2_000,
        "scorer_samples": 16_384,
    },
    overrides=("--loader.batch", "64", "--mmgem.tokenizer.name_or_path", "{shared}/tokenizer"),
    arms={
        "filtered": Arm(
            says="what gemsmith curate keeps, recipes/curate/tiny_demo.yaml", data=("{shared}/curated/shards",)
        ),
        "volume": Arm(says="every readable pair of the pool", data=("{shared}/raw/shards",)),
    },
    hypotheses=(Hypothesis(metric="mrr", arm="filtered", against="volume"),),
    why=(
        "Equal compute is equal samples of equal models: what the filter drops, the filtered arm sees repeats for. The "
        "scorer's training and the scoring are not counted, as in DataComp.",
        "One pool, scorer and curation for all seeds: the interval speaks of initial weights and order, not of pools. "
        "`gemsmith demo --seed S` draws another pool.",
        "A drawn pool of 8,000 pairs with known noise in place of 12.8 million to 12.8 billion from the web.",
    ),
    prepare=prepare,
    prepare_seed=prepare_seed,
    grade=grade,
    shown=("mrr", "recall_at_1", "recall_at_10"),
    minutes=29,
)  # fmt: skip
