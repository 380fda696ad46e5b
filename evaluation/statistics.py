"""How sure a number is: bootstrap intervals, Wilson's interval and paired permutation tests.

Everything is resampled by cluster (the image, where one image has several
captions), because queries about one picture are not independent. Resamples are
integer weights over the clusters, so that any statistic made of sums costs one
matrix product for all resamples together. Generators are seeded: the same
scores give the same interval.

Sources: Efron & Tibshirani 1993 (percentile bootstrap); Wilson 1927; Franco,
Little, Louis & Slud 2019 (Wilson's interval for clusters); Phipson & Smyth 2010
(p = (1 + hits) / (1 + draws): a permutation test's p-value is never zero).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]

BOOTSTRAP = 1_000
FLIPS = 10_000
CELLS = 4_000_000
"""Resampling works in pieces of about this many matrix cells (32 MB)."""


def _weights(clusters: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster was drawn: float64 [s, clusters] in pieces that add up to `samples` rows."""
    generator = np.random.default_rng(seed)
    piece = max(1, CELLS // clusters)
    for start in range(0, samples, piece):
        rows = min(piece, samples - start)
        drawn = generator.integers(0, clusters, size=(rows, clusters))
        drawn += np.arange(rows)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters)
        yield counts.reshape(rows, clusters).astype(np.float64)


def _by_cluster(columns: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Sums over each cluster of [n, m] columns, with the cluster's size as one more column: [clusters, m + 1]."""
    columns = np.column_stack([columns, np.ones(len(columns))])
    if clusters is None:
        return columns
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.zeros((index.max() + 1, columns.shape[1]))
    np.add.at(sums, index, columns)
    return sums


def replicates(
    columns: np.ndarray, *, clusters: np.ndarray | None = None, samples: int = BOOTSTRAP, seed: int = 0
) -> np.ndarray:
    """Bootstrap sums of the columns [n, m] and the number of queries in each resample: float64 [samples, m + 1]."""
    sums = _by_cluster(np.asarray(columns, dtype=np.float64).reshape(len(columns), -1), clusters)
    return np.concatenate([weights @ sums for weights in _weights(len(sums), samples, seed)])


def percentile_interval(values: np.ndarray) -> Interval:
    """The central 95 % of bootstrap values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray, *, clusters: np.ndarray | None = None, samples: int = BOOTSTRAP, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of the mean of per-query values [n]."""
    sums = replicates(values, clusters=clusters, samples=samples, seed=seed)
    return percentile_interval(sums[:, 0] / sums[:, 1])


def statistic_interval(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, samples: int = BOOTSTRAP, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of a statistic of column sums, for example BLEU of its n-gram counts.

    `statistic` takes sums [s, m] and returns [s].
    """
    return percentile_interval(statistic(replicates(columns, samples=samples, seed=seed)[:, :-1]))


def median_interval(
    values: np.ndarray, *, clusters: np.ndarray | None = None, samples: int = BOOTSTRAP, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of the median of per-query values [n]."""
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, dtype=np.float64)[order]
    index = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    index = index[order]
    medians = []
    for weights in _weights(int(index.max()) + 1, samples, seed):
        for row in weights:
            reached = np.cumsum(row[index])
            half = reached[-1] / 2
            lower, upper = np.searchsorted(reached, half), np.searchsorted(reached, half, side="right")
            medians.append((ordered[lower] + ordered[upper]) / 2)
    return percentile_interval(np.array(medians))


def proportion_interval(hits: np.ndarray, *, clusters: np.ndarray | None = None) -> Interval:
    """Wilson's 95 % interval of the mean of per-query hits [n] in [0, 1].

    A bootstrap of nothing but misses has no width at all; Wilson's interval
    has. Queries that share an image count for less: n is divided by the design
    effect, the variance of the clustered mean over that of independent hits
    (Franco et al. 2019).
    """
    sums = _by_cluster(np.asarray(hits, dtype=np.float64)[:, None], clusters)
    n, groups = len(hits), len(sums)
    p = float(sums[:, 0].sum() / n)
    spread = ((sums[:, 0] - p * sums[:, 1]) ** 2).sum() / n**2
    effective = min(float(n), p * (1 - p) / spread) if spread > 0 else float(groups)
    return wilson_interval(p * effective, effective)


def wilson_interval(hits: float, n: float) -> Interval:
    """Wilson's 95 % interval of the proportion hits / n."""
    z = 1.959963984540054
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def stratified_mean_recall_interval(
    hits: np.ndarray, totals: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of the mean of per-class recalls, resampled within each class.

    Resampling zeros and ones within a class is a binomial draw, so no image is
    touched. `hits`, `totals` [C]; classes without images do not take part.
    """
    present = totals > 0
    recalls = np.clip(hits[present] / totals[present], 0.0, 1.0)
    drawn = np.random.default_rng(seed).binomial(totals[present].astype(int), recalls, size=(samples, present.sum()))
    return percentile_interval((drawn / totals[present]).mean(axis=1))


def paired_p(
    a: np.ndarray, b: np.ndarray, *, clusters: np.ndarray | None = None, flips: int = FLIPS, seed: int = 0
) -> float:
    """Two-sided p-value that per-query scores a [n] and b [n] have the same mean (sign-flip permutation test).

    Under the hypothesis the two models could be exchanged for every cluster,
    so every sign of a cluster's difference is equally likely. All signs are
    enumerated where there are at most `flips` of them, else `flips` are drawn.
    """
    difference = _by_cluster(np.asarray(b, dtype=np.float64)[:, None] - np.asarray(a)[:, None], clusters)[:, 0]
    difference = difference[difference != 0]
    n = len(difference)
    if n == 0:
        return 1.0
    reached = abs(difference.sum()) * (1 - 1e-12)
    if 2**n <= flips:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ difference) >= reached).mean())
    generator = np.random.default_rng(seed)
    hits, piece = 0, max(1, CELLS // n)
    for start in range(0, flips, piece):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(min(piece, flips - start), n), dtype=np.int8)
        hits += int((np.abs(signs @ difference) >= reached).sum())
    return (1 + hits) / (1 + flips)


def t_interval(values: np.ndarray) -> Interval:
    """Student's 95 % interval of the mean of a few independent values [n], n at least 2: of paired differences, say.

    For a handful of values, where a bootstrap is far too narrow.
    """
    from scipy import stats

    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def difference_interval(
    a: np.ndarray, b: np.ndarray, *, clusters: np.ndarray | None = None, samples: int = BOOTSTRAP, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of mean(b) - mean(a) over the same queries."""
    return mean_interval(np.asarray(b) - np.asarray(a), clusters=clusters, samples=samples, seed=seed)


@dataclass(frozen=True, kw_only=True)
class GapClosed:
    """How much of the way from `raw` to `oracle` a treatment goes: 0 = none, 1 = all.

    `value` is None where the oracle is not above raw at all, and `ci95` where
    2.5 % of the resamples or more show no gap: the ratio has no finite
    interval then.
    """

    value: float | None
    ci95: Interval | None
    p_value: float
    """Paired test of treatment against raw."""


def gap_closed(
    raw: np.ndarray,
    treated: np.ndarray,
    oracle: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> GapClosed:
    """(treated - raw) / (oracle - raw) of mean per-query scores [n] each, aligned query by query.

    The interval resamples queries (clusters) jointly for the three arms.
    """
    raw, treated, oracle = (np.asarray(x, dtype=np.float64) for x in (raw, treated, oracle))
    sums = replicates(np.column_stack([treated - raw, oracle - raw]), clusters=clusters, samples=samples, seed=seed)
    gap = sums[:, 1]
    certain = (gap <= 0).mean() < 0.025
    return GapClosed(
        value=float((treated - raw).mean() / (oracle - raw).mean()) if oracle.mean() > raw.mean() else None,
        ci95=percentile_interval(sums[:, 0] / gap) if certain else None,
        p_value=paired_p(raw, treated, clusters=clusters, seed=seed),
    )
