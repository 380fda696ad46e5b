"""Verdicts against scipy's own paired tests, and what a bound means where the other arm only guesses."""

import numpy as np
import pytest
from scipy import stats

from jobs.reproduce.claim import Hypothesis
from jobs.reproduce.verdict import judge

BETTER = Hypothesis(metric="m", arm="a", against="b")
NO_WORSE = Hypothesis(metric="m", arm="a", against="b", margin=0.1)
CHEAPER = Hypothesis(metric="m", arm="a", against="b", margin=0.1, lower=True)


def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arms of 2 to 8 seeds, from much worse to much better."""
    generator = np.random.default_rng(number)
    seeds = int(generator.integers(2, 9))
    b = generator.normal(0.5, 0.05, seeds)
    return b + generator.normal(generator.uniform(-0.1, 0.1), 0.02, seeds), b


@pytest.mark.parametrize("number", range(60))
def test_verdicts_are_scipys_tests(number: int) -> None:
    a, b = drawn(number)
    test = stats.ttest_rel(a, b)
    found = judge(BETTER, a, b, 0.0)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    above = stats.ttest_rel(a, b, alternative="greater").pvalue < 0.025
    below = stats.ttest_rel(a, b, alternative="less").pvalue < 0.025
    assert found.verdict == ("holds" if above else "contradicted" if below else "not shown")

    chance = 0.1
    margin = 0.1 * (b.mean() - chance)
    not_low = stats.ttest_1samp(a - b, -margin, alternative="greater").pvalue < 0.025
    low = stats.ttest_1samp(a - b, -margin, alternative="less").pvalue < 0.025
    not_high = stats.ttest_1samp(a - b, margin, alternative="less").pvalue < 0.025
    found = judge(NO_WORSE, a, b, chance)
    assert found.verdict == ("holds" if not_low else "contradicted" if low else "not shown")
    assert found.within == (not_low and not_high), "two one-sided tests"
    assert found.bound == pytest.approx(-margin) and found.share == pytest.approx((a - b).mean() / (b.mean() - chance))

    margin = 0.1 * b.mean()
    not_high = stats.ttest_1samp(a - b, margin, alternative="less").pvalue < 0.025
    high = stats.ttest_1samp(a - b, margin, alternative="greater").pvalue < 0.025
    assert judge(CHEAPER, a, b, 0.0).verdict == ("holds" if not_high else "contradicted" if high else "not shown")


def test_the_draws_reach_every_verdict() -> None:
    for hypothesis in (BETTER, NO_WORSE, CHEAPER):
        found = {judge(hypothesis, *drawn(number), 0.1).verdict for number in range(60)}
        assert found == {"holds", "not shown", "contradicted"}


def test_an_arm_that_guesses_has_no_margin() -> None:
    """Two arms at chance differ by noise alone: "no worse" must not come for nothing."""
    generator = np.random.default_rng(0)
    a, b = 0.02 + generator.normal(0, 1e-3, (2, 5))
    found = judge(NO_WORSE, a, b, chance=0.03)
    assert found.bound == 0 and found.share is None and found.verdict != "holds"


def test_equal_arms_are_no_worse_and_not_better() -> None:
    values = [0.4, 0.5, 0.45]
    assert judge(NO_WORSE, values, values, 0.0).verdict == "holds"
    assert judge(NO_WORSE, values, values, 0.0).within is True
    assert judge(BETTER, values, values, 0.0).verdict == "not shown"
    assert judge(BETTER, values, values, 0.0).signs == 0


def test_the_same_is_the_same_to_the_last_bit() -> None:
    same = Hypothesis(metric="m", arm="a", against="b", margin=0.0)
    assert judge(same, [1.0, 0.3], [1.0, 0.3], 0.0).verdict == "holds"
    assert judge(same, [1.0, 0.3], [1.0, np.nextafter(0.3, 1)], 0.0).verdict == "contradicted"
