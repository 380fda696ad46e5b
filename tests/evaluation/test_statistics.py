"""Intervals and p-values against scipy and against enumeration."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    raw = generator.beta(0.5, 2.0, size=400)
    return raw, np.clip(raw + generator.normal(0.02, 0.1, size=400), 0, 1)


def test_mean_interval_against_scipy(scores):
    ours = statistics.mean_interval(scores[0], samples=20_000)
    theirs = stats.bootstrap((scores[0],), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=5e-4)
    assert ours == statistics.mean_interval(scores[0], samples=20_000), "the same scores, the same interval"


@pytest.mark.parametrize("size", [2, 5, 400])
def test_t_interval_against_scipy(scores, size):
    values = scores[0][:size]
    assert statistics.t_interval(values) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)))


@pytest.mark.parametrize("size", [400, 399])
def test_median_interval_against_scipy(scores, size):
    ours = statistics.median_interval(scores[0][:size], samples=5_000)
    theirs = stats.bootstrap((scores[0][:size],), np.median, n_resamples=5_000, method="percentile", rng=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=5e-3)


@pytest.mark.parametrize("copies", [[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 0, 1], [1, 2, 0, 0]])
def test_median_of_a_resample_is_the_median_of_its_values(monkeypatch, copies):
    values = np.array([0.3, 0.1, 0.9, 0.4])
    monkeypatch.setattr(statistics, "_weights", lambda *_: iter([np.array([copies], dtype=float)]))
    expected = np.median(np.repeat(values, copies))
    assert statistics.median_interval(values) == pytest.approx((expected, expected))


def test_pieces_do_not_change_the_distribution(scores, monkeypatch):
    whole = statistics.mean_interval(scores[0], samples=5_000)
    monkeypatch.setattr(statistics, "CELLS", 1_000)
    assert statistics.mean_interval(scores[0], samples=5_000) == pytest.approx(whole)


def test_clusters_widen_the_interval_as_whole_images_are_drawn(scores):
    values, clusters = np.repeat(scores[0], 5), np.repeat(np.arange(400), 5)
    narrow = statistics.mean_interval(values, samples=5_000)
    wide = statistics.mean_interval(values, clusters=clusters, samples=5_000)
    one_each = statistics.mean_interval(scores[0], samples=5_000)
    assert wide == pytest.approx(one_each)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(np.sqrt(5), rel=0.1)
    shuffled = np.random.default_rng(0).permutation(2000)
    assert statistics.mean_interval(values[shuffled], clusters=clusters[shuffled], samples=5_000) == pytest.approx(wide)
    medians = statistics.median_interval(values, clusters=clusters, samples=2_000)
    assert medians == pytest.approx(statistics.median_interval(scores[0], samples=2_000), abs=0.01)


def test_uneven_clusters_weigh_by_their_queries():
    values, clusters = np.array([1.0, 0.0, 0.0, 0.0]), np.array([7, 3, 3, 3])
    sums = statistics.replicates(values, clusters=clusters, samples=2_000)
    means = sums[:, 0] / sums[:, 1]
    assert set(np.round(means, 12)) == {0.0, 0.25, 1.0}
    assert (means == 0.25).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (517, 1000)])
def test_wilson_against_scipy(hits, n):
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert statistics.wilson_interval(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_proportion_of_clusters():
    generator = np.random.default_rng(0)
    hits = (generator.random(300) < 0.2).astype(float)
    plain = statistics.proportion_interval(hits)
    assert plain == pytest.approx(statistics.wilson_interval(hits.sum(), 300))
    five_times = statistics.proportion_interval(np.repeat(hits, 5), clusters=np.repeat(np.arange(300), 5))
    assert five_times == pytest.approx(plain), "copies of a query add nothing"
    assert statistics.proportion_interval(np.zeros(300)) == pytest.approx(statistics.wilson_interval(0, 300))
    none = statistics.proportion_interval(np.zeros(1500), clusters=np.repeat(np.arange(300), 5))
    assert none == pytest.approx(statistics.wilson_interval(0, 300))


def test_proportion_of_clusters_covers_the_truth():
    """Five captions of an image share its difficulty: 95 % of the intervals must hold the true rate."""
    generator = np.random.default_rng(1)
    clusters, inside = np.repeat(np.arange(120), 5), 0
    for _ in range(600):
        hits = generator.random(600) < np.repeat(generator.beta(0.5, 1.5, 120), 5)
        low, high = statistics.proportion_interval(hits.astype(float), clusters=clusters)
        inside += low <= 0.25 <= high
    assert 0.92 < inside / 600 < 0.975


def test_mean_recall_interval_against_resampled_images():
    generator = np.random.default_rng(4)
    totals = np.array([5, 40, 0, 12])
    images = [generator.random(n) < p for n, p in zip(totals, (0.5, 0.9, 0.3, 0.2))]
    hits = np.array([image.sum() for image in images])
    drawn = [
        np.mean([generator.choice(image, len(image)).mean() for image in images if len(image)]) for _ in range(4_000)
    ]
    ours = statistics.stratified_mean_recall_interval(hits, totals, samples=20_000)
    assert ours == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.015)


@pytest.mark.parametrize("n", [1, 4, 12])
def test_exact_p_enumerates_all_signs(n):
    generator = np.random.default_rng(n)
    a, b = generator.random(n), generator.random(n) + 0.2
    sums = [abs(np.dot(signs, b - a)) for signs in product((1, -1), repeat=n)]
    expected = np.mean(np.array(sums) >= abs((b - a).sum()) - 1e-12)
    assert statistics.paired_p(a, b) == pytest.approx(expected)
    if n > 1:  # scipy wants two or more
        theirs = stats.permutation_test((b - a,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert statistics.paired_p(a, b) == pytest.approx(theirs.pvalue)


def test_drawn_p_against_scipy():
    generator = np.random.default_rng(2)
    a = generator.random(200)
    b = a + generator.normal(0.013, 0.1, 200)
    theirs = stats.permutation_test((b - a,), np.mean, permutation_type="samples", n_resamples=50_000, rng=0)
    assert 0.01 < theirs.pvalue < 0.5
    assert statistics.paired_p(a, b, flips=50_000) == pytest.approx(theirs.pvalue, abs=0.01)


def test_p_is_never_zero_and_one_where_nothing_differs():
    a = np.random.default_rng(0).random(500)
    assert statistics.paired_p(a, a) == 1.0
    assert statistics.paired_p(a, a + 1) == 1 / 10_001


def test_p_flips_images_not_captions():
    a, b = np.zeros(50), np.full(50, 0.1)
    assert statistics.paired_p(a, b) < 1e-3
    assert statistics.paired_p(a, b, clusters=np.repeat([0, 1], 25)) == 0.5


def test_p_is_uniform_without_a_difference():
    generator = np.random.default_rng(8)
    found = [statistics.paired_p(generator.random(40), generator.random(40), flips=400) for _ in range(300)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_gap_closed_and_its_interval():
    generator = np.random.default_rng(3)
    raw = generator.random(2_000)
    oracle = raw + generator.normal(0.2, 0.3, 2_000)
    treated = raw + 0.8 * (oracle - raw) + generator.normal(0, 0.1, 2_000)
    found = statistics.gap_closed(raw, treated, oracle)
    assert found.value == pytest.approx((treated.mean() - raw.mean()) / (oracle.mean() - raw.mean()))

    def ratio(r, t, o, axis=-1):
        return (t.mean(axis) - r.mean(axis)) / (o.mean(axis) - r.mean(axis))

    theirs = stats.bootstrap((raw, treated, oracle), ratio, paired=True, method="percentile", n_resamples=4_000, rng=0)
    assert found.ci95 == pytest.approx(tuple(theirs.confidence_interval), abs=5e-3)
    assert found.p_value < 0.01


def test_no_gap_has_no_interval():
    generator = np.random.default_rng(3)
    raw, treated = generator.random(100), generator.random(100)
    assert statistics.gap_closed(raw, treated, raw + generator.normal(0, 1, 100)).ci95 is None
    assert statistics.gap_closed(raw, treated, raw - 0.1).value is None
