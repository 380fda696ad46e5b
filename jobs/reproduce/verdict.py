"""Whether a hypothesis holds: the paired t interval of the mean difference over the seeds, against its bound.

Seeds are the unit: each gives one difference of two arms that share data,
order and initial weights, so that what a seed does to both drops out. The
interval is two-sided at 95 %; a bound of 0 (better) or below it (no worse)
that lies under the whole interval is then a one-sided test at 2.5 %, as in
non-inferiority trials (ICH E9). A claim of several hypotheses needs all of
them (an intersection-union test, Berger 1982), so none is corrected for the
others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation.statistics import Interval, t_interval
from jobs.reproduce.claim import Hypothesis

Verdict = Literal["holds", "not shown", "contradicted", "not judged"]
"""`judge` gives the first three; what was not tried as registered is "not judged"."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """difference, interval, bound: in the metric's own units · share: the difference as a share of what `against`
    scores above chance, None where it guesses · within: whether the whole interval lies inside +-margin, None without
    a margin (equivalence by two one-sided tests) · signs: seeds in which the arm scored higher."""

    hypothesis: Hypothesis
    difference: float
    interval: Interval
    bound: float
    share: float | None
    within: bool | None
    signs: int
    verdict: Verdict


def judge(hypothesis: Hypothesis, arm: Sequence[float], against: Sequence[float], chance: float) -> Judgement:
    """Judge from a value per seed [n], n at least 2, of the two arms in the order of the seeds."""
    a, b = np.asarray(arm, dtype=np.float64), np.asarray(against, dtype=np.float64)
    above = float(b.mean()) - chance
    difference = a - b
    low, high = t_interval(difference)
    margin = None if hypothesis.margin is None else hypothesis.margin * max(above, 0.0)
    bound = (margin or 0.0) * (1 if hypothesis.lower else -1)
    if hypothesis.margin == 0:
        better = bool((difference == 0).all())
        worse = not better
    else:
        better, worse = (high < bound, low > bound) if hypothesis.lower else (low > bound, high < bound)
    return Judgement(
        hypothesis=hypothesis,
        difference=float(difference.mean()),
        interval=(low, high),
        bound=bound,
        share=float(difference.mean()) / above if above > 0 else None,
        within=None if margin is None or hypothesis.margin == 0 else bool(low > -margin and high < margin),
        signs=int((difference > 0).sum()),
        verdict="holds" if better else "contradicted" if worse else "not shown",
    )
