"""What a claim is: arms that differ in one thing, what is measured of them, and the hypotheses, fixed beforehand.

The arms of one seed share their data, their order, their tokenizer and their
initial weights; what differs is written in their overrides, or is the folder
they train on. A claim holds where all its hypotheses do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jobs.reproduce.workshop import Seed, Workshop


LIMIT_S = 30 * 60
"""What a claim may take on two quiet cores: its data, all arms of all seeds, and their grading."""

SEEDS = 5
"""Repetitions that a claim is judged by, no fewer and no more: who could add seeds until one holds would find one."""


class Score(NamedTuple):
    """A metric of one trained arm, and what guessing scores (0 where nothing does)."""

    value: float
    chance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`overrides` and `data` are words of `gemsmith train`, in which `{data}` is the seed's folder of data and
    `{shared}` the claim's · times: how many times the claim's samples it sees, where it has more streams ·
    run: one that `prepare_seed` has trained, which is graded as it is."""

    says: str
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ("{data}/train",)
    times: float = 1
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """`arm` against `against` on one metric, by the paired differences arm - against over the seeds.

    margin: None says that `arm` is better: the interval of the mean difference lies above 0. A share m says that it is
    no worse: the interval lies above -m times what `against` scores above chance (a model that guesses has no margin).
    0 says that the two are the same, in every seed to the last bit.
    lower: the metric is a cost, so that "above" is below, and the bound of no worse is +m times what `against` costs.
    """

    metric: str
    arm: str
    against: str
    margin: float | None = None
    lower: bool = False


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim and how it is tried.

    title, source, says: what the paper claims, where, and what is tried here · recipe: of recipes/train ·
    recipes: the other files that its preparation trains, curates or makes data by ·
    sizes: samples that each arm sees, pairs of each set · overrides: words of all arms · why: reasons for the choices
    made beforehand, and what is smaller or other than in the paper · prepare: makes what all seeds share ·
    prepare_seed: makes a seed's data · grade: (seed, arm, folder of its run) -> scores · shown: metrics on the
    page, the judged ones first · minutes: on two quiet cores.
    """

    title: str
    source: str
    says: str
    recipe: str
    sizes: Mapping[str, int]
    arms: Mapping[str, Arm]
    hypotheses: tuple[Hypothesis, ...]
    why: tuple[str, ...]
    prepare: "Callable[[Workshop], None]"
    prepare_seed: "Callable[[Seed], None]"
    grade: "Callable[[Seed, str, Path], dict[str, Score]]"
    shown: tuple[str, ...]
    minutes: int
    overrides: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
