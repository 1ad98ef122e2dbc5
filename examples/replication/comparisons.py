"""Means, intervals, paired tests, and what a number of seeds could have shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 9999
QUANTILES = (np.arange(5000) + 0.5) / 5000


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds.

    Attributes:
        low, high: the mean's 95% bootstrap interval (bias-corrected and accelerated); NaN of fewer than two.
        sd: the sample's; NaN of one.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of two methods with the same seeds.

    Attributes:
        spread: of the differences, seed by seed.
        p: of the paired t-test, two-sided; 1 where all differences are 0.
        wilcoxon: of the signed-rank test, which supposes no normal distribution.
        detectable: the smallest true difference that this many seeds would show with a power of 0.8 at the
            level 0.05 / comparisons, given these differences' standard deviation.
    """

    spread: Spread
    p: float
    wilcoxon: float
    detectable: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2:
        return Spread(len(x), mean, float("nan"), float("nan"), float("nan"))
    sd = float(x.std(ddof=1))
    if np.ptp(x) == 0:  # the bootstrap has nothing to resample
        return Spread(len(x), mean, 0.0, mean, mean)
    interval: Any = stats.bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return Spread(len(x), mean, sd, float(interval.low), float(interval.high))


def difference(a: Mapping[int, float], b: Mapping[int, float], comparisons: int = 1) -> Difference:
    """a - b over the seeds that both have.

    Args:
        a, b: by seed.
        comparisons: how many are made beside this one, itself included: `detectable` is corrected for them.

    Raises:
        ValueError: fewer than two seeds in common.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        raise ValueError(f"{len(common)} seeds in common: there is nothing to test with fewer than two")
    d = np.array([a[seed] - b[seed] for seed in common])
    of = spread(list(d))
    if np.ptp(d) == 0:
        p = wilcoxon = 1.0 if d[0] == 0 else 0.0
        return Difference(of, p, wilcoxon, 0.0)
    student: Any = stats.ttest_1samp(d, 0)
    ranked: Any = stats.wilcoxon(d)
    p, wilcoxon = float(student.pvalue), float(ranked.pvalue)
    return Difference(of, p, wilcoxon, detectable(of.sd, len(d), LEVEL / comparisons))


def clustered(
    x: Sequence[float], y: Sequence[float], clusters: Sequence[int], permutations: int = 1999
) -> float:
    """p of Spearman's correlation, two-sided, where points of a cluster are not independent of each other.

    Runs of one seed with ten methods are nearly one run ten times. So clusters are permuted as wholes: each
    takes another's y, point by point. Points that the other cluster lacks are left out of that permutation.
    What was observed counts as one of the `permutations` + 1, so p is never 0.

    Args:
        x, y, clusters: by point; a cluster's points in the same order in all of them.
    """
    at = [np.flatnonzero(np.asarray(clusters) == name) for name in sorted(set(clusters))]
    xs, ys = ([np.asarray(values)[places] for places in at] for values in (x, y))
    rng = np.random.default_rng(0)

    def statistic(order: Sequence[int]) -> float:
        pairs = [(xs[i][: len(ys[j])], ys[j][: len(xs[i])]) for i, j in enumerate(order)]
        found: Any = stats.spearmanr(*(np.concatenate(of) for of in zip(*pairs, strict=True)))  # pyright: ignore
        return abs(float(found.statistic))

    observed = statistic(range(len(at))) - 1e-12
    beyond = sum(statistic(list(rng.permutation(len(at)))) >= observed for _ in range(permutations))
    return (beyond + 1) / (permutations + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (Holm 1979): reject where they are below the level.

    The smallest is multiplied by the number of tests, the next by one less, ...; none is below the one before
    it, nor above 1.
    """
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def power(effect: float, sd: float, n: int, level: float = LEVEL) -> float:
    """Of the two-sided paired t-test with n pairs whose differences have this mean and standard deviation."""
    # scipy's noncentral t is NaN in some tails. So: what the normal distribution gives, averaged over how far
    # the sample's standard deviation may be off, a chi distribution's quantiles.
    shift = effect / sd * np.sqrt(n)
    off = np.sqrt(stats.chi2.ppf(QUANTILES, n - 1) / (n - 1))
    limit = stats.t.ppf(1 - level / 2, n - 1) * off
    return float(np.mean(stats.norm.cdf(shift - limit) + stats.norm.cdf(-shift - limit)))


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The smallest effect for which `power` is 0.8."""
    high = 0.1
    while power(high, 1.0, n, level) < POWER:
        high *= 1.5
    unit: Any = brentq(lambda effect: power(effect, 1.0, n, level) - POWER, 0.0, high)
    return float(unit) * sd
