"""Every interval and every test that the evidence uses, in one place.

Conventions: intervals are two-sided at 95 %, p-values carry the "+1" of a Monte-Carlo test, and
whatever is resampled is a list of patients, never of scans. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def clopper_pearson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a proportion: Beta quantiles (k, n - k + 1) and (k + 1, n - k).

    `successes` and `n` may be fractional, as effective counts of a weighted share are.

    Raises:
        ValueError: not 0 <= successes <= n, or n <= 0.

    Source: Clopper and Pearson 1934; fractional counts: Korn and Graubard 1998.

    >>> [round(x, 4) for x in clopper_pearson(0, 50)]
    [0.0, 0.0711]
    """
    from scipy.stats import beta

    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"clopper_pearson: {successes} of {n}, expected 0 <= successes <= n")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def normal_interval(
    value: float,
    se: float,
    low: float = -math.inf,
    high: float = math.inf,
    without_spread: float = 0.0,
) -> tuple[float, float]:
    """value -+ 1.96 standard errors, clipped to the range the figure can take.

    Args:
        value: the figure.
        se: its standard error.
        low: the smallest that it can be.
        high: the largest.
        without_spread: how far it may be off where nothing varied, and the error is 0.
    """
    reach = Z95 * se if se > 1e-12 else max(Z95 * se, without_spread)
    return max(low, value - reach), min(high, value + reach)


def share_interval(value: float, halves: Floats, without_spread: float) -> tuple[float, float]:
    """The interval of a share, which errs the less the nearer it is to 0 or 1.

    sin^2(a -+ 1.96 s), a = asin(sqrt(value)), s the standard error of a from halves (`half_se`):
    it is about the same whatever the share, that of halves included, which need not be that of the
    whole. value - 1.96 se lay above the truth in 9 % of studies of a coverage of 0.92, because
    large values come with small errors. Each end is that of value -+ 1.96 se where that is farther,
    as at 0 and 1 themselves, where the transformation is steep.

    Args:
        value: the share.
        halves: its values on random halves of every sample's patients.
        without_spread: how far it may be off where nothing varied, and the error is 0.

    Source: Anscombe 1948 (the transformation of a proportion).
    """
    low, high = normal_interval(value, half_se(halves), 0.0, 1.0, without_spread)
    se = half_se(np.arcsin(np.sqrt(np.clip(halves, 0.0, 1.0))))
    middle = math.asin(math.sqrt(min(max(value, 0.0), 1.0)))
    ends = max(0.0, middle - Z95 * se), min(math.pi / 2, middle + Z95 * se)
    return min(low, math.sin(ends[0]) ** 2), max(high, math.sin(ends[1]) ** 2)


def distance_interval(value: float, se: float, null_se: float) -> tuple[float, float]:
    """value -+ 1.96 se, with an upper end for a squared distance, which errs more the larger it is.

    Near no difference small values come with small errors, so that value + 1.96 se is below the
    truth too often (6 % of studies, not 2.5 %). Where the truth is t the variance is about
    null_se^2 + b t; b = (se^2 - null_se^2) / value, or null_se for a smaller value, is known from
    the value's own error. The upper end is the largest t with
    (value - t)^2 <= 1.96^2 (null_se^2 + b t):

    c + sqrt(c^2 - value^2 + 1.96^2 null_se^2), c = value + 1.96^2 b / 2,

    or value + 1.96 se where that is larger.

    Args:
        value: the unbiased squared distance; may be negative.
        se: its standard error.
        null_se: its standard deviation where nothing differs, as permutations show it.

    Source: Wilson 1927 (the score interval, of a proportion).
    """
    low, high = normal_interval(value, se)
    if null_se <= 1e-12:  # nothing to divide by: all scans are alike
        return low, high
    grows = max(0.0, se**2 - null_se**2) / max(value, null_se)
    middle = value + Z95**2 * grows / 2
    root = middle**2 - value**2 + (Z95 * null_se) ** 2
    return low, max(high, middle + math.sqrt(max(0.0, root)))


def jackknife_se(leave_one_out: Sequence[Floats]) -> float:
    """Standard error of a statistic of independent samples from its leave-one-patient-out values.

    sqrt(sum over samples of (n - 1) / n * sum_i (theta_-i - mean)^2), one array a sample. It
    errs upwards for a U-statistic that is degenerate, at most by sqrt(2).

    Source: Arvesen 1969 (several samples); Efron and Stein 1981 (upward bias).
    """
    variance = 0.0
    for values in leave_one_out:
        n = len(values)
        variance += (n - 1) / n * float(np.sum((values - values.mean()) ** 2))
    return math.sqrt(variance)


def half(n: int, rng: np.random.Generator) -> Ints:
    """Indices of a random half of n patients, without replacement, sorted."""
    return np.sort(rng.permutation(n)[: n // 2]).astype(np.int64)


def half_se(values: Floats) -> float:
    """Standard error of a statistic from its values on random halves of every sample's patients.

    The delete-d jackknife with d = n/2: the variance of a mean over half the patients, drawn
    without replacement, is that of the whole sample's mean. No patient appears twice, so k-NN
    metrics are not corrupted as by a bootstrap, and it holds for statistics that are not smooth.
    The spread is taken round the halves' own mean, because k-NN figures move with n.

    Source: Shao and Wu 1989, The Annals of Statistics 17:1176.
    """
    return float(np.std(values, ddof=1))


def permutation_p(observed: float, null: Floats) -> float:
    """One-sided Monte-Carlo p-value (1 + #{null >= observed}) / (1 + n).

    Guarantee: P(p <= a) <= a for every a when observed and null are exchangeable.
    Source: Phipson and Smyth 2010.
    """
    # a permuted value that equals the observed one up to rounding counts as reaching it
    slack = 1e-12 * max(1.0, abs(observed))
    return (1 + int(np.sum(null >= observed - slack))) / (1 + len(null))


def permuted_labels(first: int, total: int, times: int, rng: np.random.Generator) -> Bools:
    """(times, total) random relabellings of patients, each with `first` of them True."""
    order = np.argsort(rng.random((times, total)), axis=1)
    return np.asarray(order < first)


def benjamini_hochberg(p: Floats, rate: float) -> Bools:
    """Which hypotheses are rejected at false discovery rate `rate`.

    The largest k with p_(k) <= k * rate / m, and every p up to p_(k).
    Source: Benjamini and Hochberg 1995.

    >>> benjamini_hochberg(np.array([0.001, 0.8, 0.02, 0.03]), 0.05).tolist()
    [True, False, True, True]
    """
    m = len(p)
    if m == 0:
        return np.zeros(0, dtype=bool)
    ordered = np.sort(p)
    reached = np.nonzero(ordered <= rate * np.arange(1, m + 1) / m)[0]
    if len(reached) == 0:
        return np.zeros(m, dtype=bool)
    return np.asarray(p <= ordered[reached[-1]])


def exceedance_p(k: int, m: int, n: int) -> float:
    """Chance that `k` or more of `m` values are larger than all `n` of a null, were they alike.

    The k largest of all m + n are then values with probability
    m (m - 1) ... (m - k + 1) / ((m + n) (m + n - 1) ... (m + n - k + 1)), exactly, whatever it is
    that both are drawn from. 1 where there is no null.
    Source: Rosenbaum 1954 (a nonparametric test of location).

    >>> exceedance_p(2, 2, 2)
    0.16666666666666666
    """
    i = np.arange(k if n else 0)
    return float(np.prod((m - i) / (m + n - i)))


def generalised_pareto(excess: Floats) -> tuple[float, float]:
    """(shape, scale) of a generalised Pareto tail from its excesses, for tests: at least 1 / k.

    Probability-weighted moments: with a0 the mean and a1 the mean of (1 - (i - 0.35) / k) x_(i),
    shape = 2 - a0 / (a0 - 2 a1) and scale = 2 a0 a1 / (a0 - 2 a1). A shape below 1 / k, k the
    number of excesses, becomes 1 / k with the mean as scale: (1 + x / sum)^-k is the exact chance
    that a further exponential excess is larger than x, the uncertainty of the scale included, and
    a light tail is never extrapolated to an end point that k points cannot know.

    Source: Hosking and Wallis 1987 (moments; scipy's maximum likelihood is erratic for k < 50).
    """
    k = len(excess)
    x = np.sort(excess)
    mean = float(x.mean())
    weight = 1 - (np.arange(1, k + 1) - 0.35) / k
    a1 = float(np.mean(weight * x))
    shape, scale = 0.0, mean
    if mean - 2 * a1 > 1e-12 * mean:
        shape = 2 - mean / (mean - 2 * a1)
        scale = 2 * mean * a1 / (mean - 2 * a1)
    if shape < 1 / k or scale <= 0:
        return 1 / k, mean
    return shape, scale


def tail_p(values: Floats, null: Floats) -> Floats:
    """P(a new null value > x) for each x of `values`, with a generalised Pareto upper tail.

    Beyond u, the (k+1)-th largest of the n null values, p = (k + 1) / (n + 1) * S(x - u) with S
    the tail fitted to the k excesses; k is a quarter of n, at least ten where that is not more
    than half. Up to u, and everywhere when k < 5 or all excesses are equal to 0, p is the rank
    (1 + #{null >= x}) / (n + 1).

    Source: Pickands 1975; Knijnenburg et al. 2009 (tails of permutation nulls).
    """
    from scipy.stats import genpareto

    n = len(null)
    ordered = np.sort(null)
    p = (1 + n - np.searchsorted(ordered, values, side="left")) / (n + 1)
    k = max(math.ceil(n / 4), min(n // 2, 10))
    if k < 5:
        return np.asarray(p, dtype=np.float64)
    threshold = ordered[n - k - 1]
    excess = ordered[n - k :] - threshold
    if excess.mean() <= 1e-12:
        return np.asarray(p, dtype=np.float64)
    shape, scale = generalised_pareto(excess)
    beyond = values > threshold
    tail = genpareto.sf(values[beyond] - threshold, shape, scale=scale)
    p[beyond] = (k + 1) / (n + 1) * tail
    return np.asarray(p, dtype=np.float64)


def wins(members: Floats, others: Floats) -> Floats:
    """(n_members, n_others): 1 where the member scores higher, 0.5 at a tie, 0 otherwise."""
    a, b = members[:, None], others[None, :]
    return np.asarray((a > b) + 0.5 * (a == b), dtype=np.float64)


def auc(members: Floats, others: Floats) -> float:
    """P(a member scores higher than a non-member), ties half: the area under the ROC curve.

    (R - n (n + 1) / 2) / (n m) with R the sum of the members' mid-ranks.
    Source: Mann and Whitney 1947; Hanley and McNeil 1982.

    >>> auc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata

    n, m = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(
    members: Floats, others: Floats, times: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile interval of the AUC, patients of both groups drawn with replacement."""
    score = wins(members, others)
    n, m = score.shape
    by_n = rng.multinomial(n, np.full(n, 1 / n), size=times).astype(np.float64)
    by_m = rng.multinomial(m, np.full(m, 1 / m), size=times).astype(np.float64)
    return percentiles(np.sum((by_n @ score) * by_m, axis=1) / (n * m), min(n, m))


def percentiles(draws: Floats, n: int) -> tuple[float, float]:
    """Percentile interval of a share from its bootstrap draws.

    Draws that are all 1, or all 0, have no spread; then the end away from that edge is the exact
    bound of Clopper and Pearson for n trials, 0.025^(1 / n) or 1 less it.
    """
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    if low == 1.0:
        low = clopper_pearson(n, n)[0]
    if high == 0.0:
        high = clopper_pearson(0, n)[1]
    return low, high


def random_halves(
    members: Floats, times: int, rng: np.random.Generator
) -> Iterator[tuple[Floats, Floats]]:
    """The members split at random into two halves, between which there is nothing to tell."""
    for _ in range(times):
        order = rng.permutation(members)
        yield order[: len(members) // 2], order[len(members) // 2 :]


def auc_permutation_p(
    members: Floats, others: Floats, times: int, rng: np.random.Generator
) -> float:
    """One-sided p that members score higher, labels permuted over patients."""
    from scipy.stats import rankdata

    n, m = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    null = permuted_labels(n, n + m, times, rng) @ ranks
    return permutation_p(float(ranks[:n].sum()), null)


def fisher_interval(r: float, n: int) -> tuple[float, float] | None:
    """95 % interval of a Pearson correlation: tanh(atanh r -+ 1.96 / sqrt(n - 3)); null for n < 5.

    Source: Fisher 1915.
    """
    if n < 5:
        return None
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    width = Z95 / math.sqrt(n - 3)
    return math.tanh(z - width), math.tanh(z + width)
