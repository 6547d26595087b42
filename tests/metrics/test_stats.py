"""Every interval and test against a closed form, a reference library or its own promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference
from sklearn.metrics import roc_auc_score

from synthmed.metrics import stats


@given(st.integers(1, 400), st.data())
def test_clopper_pearson_is_scipys_exact_interval(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    exact = reference.binomtest(k, n).proportion_ci(method="exact")
    assert stats.clopper_pearson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_clopper_pearson_bounds_stated_in_the_design() -> None:
    # one-sided 95 % in the rule of thumb "0 of n": 5.8 % at 50 and 0.6 % at 500
    assert stats.clopper_pearson(0, 50, 0.90)[1] == pytest.approx(0.058, abs=5e-4)
    assert stats.clopper_pearson(0, 500, 0.90)[1] == pytest.approx(0.006, abs=5e-5)
    with pytest.raises(ValueError, match="3 of 2"):
        stats.clopper_pearson(3, 2)


def test_benjamini_hochberg_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(30) ** 3
        expected = reference.false_discovery_control(p) <= 0.05
        assert (stats.benjamini_hochberg(p, 0.05) == expected).all()
    assert stats.benjamini_hochberg(np.zeros(0), 0.01).shape == (0,)


@given(st.integers(1, 5), st.integers(0, 5))
def test_exceedance_counts_the_orders_in_which_values_come_last(m: int, n: int) -> None:
    orders = list(combinations(range(m + n), m))  # which ranks are of values
    for k in range(m + 1):
        beyond = sum(set(range(m + n - k, m + n)) <= set(o) for o in orders)
        assert stats.exceedance_p(k, m, n) == pytest.approx(beyond / len(orders) if n else 1)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_auc_is_the_share_of_pairs_won_and_sklearns(a: list[int], b: list[int]) -> None:
    members, others = np.array(a, float), np.array(b, float)
    naive = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert stats.auc(members, others) == pytest.approx(naive, abs=1e-12)
    truth = [1] * len(a) + [0] * len(b)
    assert stats.auc(members, others) == pytest.approx(roc_auc_score(truth, a + b), abs=1e-12)


def test_auc_interval_covers_and_is_never_a_point() -> None:
    rng = np.random.default_rng(1)
    truth = reference.norm.cdf(0.5 / np.sqrt(2))
    covered = 0
    for i in range(200):
        a, b = rng.standard_normal(60) + 0.5, rng.standard_normal(40)
        low, high = stats.auc_interval(a, b, 200, np.random.default_rng(i))
        covered += low <= truth <= high
    assert covered >= 180
    low, high = stats.auc_interval(np.ones(10), np.zeros(8), 200, rng)
    assert low < 0.7 and high == 1.0


def test_auc_permutation_p_is_uniform_without_an_effect_and_small_with_one() -> None:
    rng = np.random.default_rng(2)
    p = [
        stats.auc_permutation_p(rng.standard_normal(20), rng.standard_normal(15), 99, rng)
        for _ in range(400)
    ]
    assert reference.kstest(p, "uniform").pvalue > 1e-3
    assert stats.auc_permutation_p(np.arange(20) + 30.0, np.arange(15.0), 99, rng) == 0.01


def test_permuted_labels_keep_the_group_sizes() -> None:
    labels = stats.permuted_labels(7, 20, 50, np.random.default_rng(0))
    assert labels.shape == (50, 20) and (labels.sum(axis=1) == 7).all()
    assert len({row.tobytes() for row in labels}) > 45


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal(30), rng.standard_normal(20)
    without = [(v.sum() - v) / (len(v) - 1) for v in (x, y)]
    exact = np.sqrt(x.var(ddof=1) / 30 + y.var(ddof=1) / 20)
    assert stats.jackknife_se(without) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "se", "null_se"),
    [(0.04, 0.02, 0.007), (0.01, 0.012, 0.007), (-0.004, 0.008, 0.007), (0.5, 0.05, 0.01)],
)
def test_the_upper_end_of_a_distance_is_where_its_own_error_just_reaches_back(
    value: float, se: float, null_se: float
) -> None:
    low, high = stats.distance_interval(value, se, null_se)
    assert low == value - stats.Z95 * se and high >= value + stats.Z95 * se
    grows = max(0.0, se**2 - null_se**2) / max(value, null_se)
    if high > value + stats.Z95 * se:
        spread = np.sqrt(null_se**2 + grows * high)
        assert high - value == pytest.approx(stats.Z95 * spread, rel=1e-9)


def test_a_distance_without_any_scatter_has_a_plain_interval() -> None:
    assert stats.distance_interval(0.0, 0.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("distance", [0.0, 0.05, 0.2, 1.0])
def test_the_interval_of_a_distance_covers_above_as_it_should(distance: float) -> None:
    """|mean|^2 - d / n of N(m, I) is unbiased for |m|^2; its jackknife says 2 |mean| / sqrt n."""
    d, n, rng = 5, 50, np.random.default_rng(8)
    means = rng.standard_normal((4000, d)) / np.sqrt(n)
    means[:, 0] += np.sqrt(distance)
    square = np.sum(means**2, axis=1)
    above = plain = held = 0
    for s in square:
        value, se = s - d / n, 2 * np.sqrt(s / n)
        low, high = stats.distance_interval(value, se, np.sqrt(2 * d) / n)
        held += low <= distance <= high
        above += distance > high
        plain += distance > value + stats.Z95 * se
    assert held >= 0.94 * len(square)
    assert above <= 0.05 * len(square) and above <= plain
    if distance == 0.2:  # where it was short
        assert plain >= 0.05 * len(square) and above <= 0.03 * len(square)


def test_half_se_of_a_mean_is_its_standard_error() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal(40)
    halves = np.array([x[stats.half(40, rng)].mean() for _ in range(20_000)])
    # the exact variance over all halves is s^2 / n, s^2 with divisor n - 1
    assert stats.half_se(halves) == pytest.approx(np.sqrt(x.var(ddof=1) / 40), rel=0.03)


def test_generalised_pareto_finds_the_shape_of_a_large_sample() -> None:
    rng = np.random.default_rng(5)
    for shape in (0.1, 0.3):
        x = reference.genpareto.rvs(shape, scale=2.0, size=50_000, random_state=rng)
        found = stats.generalised_pareto(x)
        likely = reference.genpareto.fit(x, floc=0)
        assert found == pytest.approx((likely[0], likely[2]), abs=0.05)
    # a bounded tail is not extrapolated to its end point
    assert stats.generalised_pareto(rng.random(20))[0] == 1 / 20


@pytest.mark.parametrize("law", ["expon", "norm", "uniform", "gumbel_r", "laplace"])
@pytest.mark.parametrize("n", [12, 20, 50])
def test_tail_p_keeps_its_promise_in_the_far_tail(law: str, n: int) -> None:
    """P(p <= a) <= a for a new value of the null; checked where the screen uses it."""
    rng = np.random.default_rng(6)
    draws = getattr(reference, law)
    null = draws.rvs(size=(4000, n + 1), random_state=rng)
    p = np.array([stats.tail_p(row[:1], row[1:])[0] for row in null])
    for level in (0.05, 0.01, 0.002):
        # three standard errors of a share of 4000
        assert np.mean(p <= level) <= level + 3 * np.sqrt(level / 4000)


def test_tail_p_orders_values_and_falls_back_to_ranks() -> None:
    null = np.random.default_rng(7).standard_normal(40)
    grid = np.linspace(-3, 12, 200)
    p = stats.tail_p(grid, null)
    assert (np.diff(p) <= 1e-12).all() and p[0] == 1.0 and p[-1] < 1e-5
    assert stats.tail_p(np.array([9.0]), null[:6])[0] == pytest.approx(1 / 7)
    assert stats.tail_p(np.array([9.0, 1.0]), np.ones(30)).tolist() == [1 / 31, 1.0]


def test_fisher_interval_is_scipys() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal(30)
    y = x + rng.standard_normal(30)
    found = reference.pearsonr(x, y)
    exact = found.confidence_interval()
    assert stats.fisher_interval(found.statistic, 30) == pytest.approx((exact.low, exact.high))
    assert stats.fisher_interval(0.9, 4) is None


@pytest.mark.parametrize("share", [0.03, 0.08, 0.3, 0.5, 0.8, 0.92, 0.97])
def test_the_interval_of_a_share_holds_it_also_near_an_edge(share: float) -> None:
    """Over the quantiles of estimates as of fifty trials, whose halves scatter as they do."""
    n = 50
    values = reference.beta.ppf((np.arange(400) + 0.5) / 400, n * share, n * (1 - share))
    quantiles = (np.arange(100) + 0.5) / 100
    above = below = plain = 0
    for v in values:
        halves = reference.beta.ppf(quantiles, n * v, n * (1 - v))
        low, high = stats.share_interval(v, halves, 0.0)
        assert 0 <= low <= v <= high <= 1
        above, below = above + (low > share), below + (high < share)
        plain += abs(v - share) > stats.Z95 * np.sqrt(v * (1 - v) / (n + 1))
    assert above + below < plain
    if share in (0.03, 0.97):  # an expected count of one and a half: better than a plain one
        assert plain >= 0.1 * len(values) and above + below <= 0.09 * len(values)
    else:
        assert above + below <= 0.065 * len(values)


def test_a_share_without_any_scatter_has_the_exact_bound() -> None:
    assert stats.share_interval(1.0, np.ones(9), 0.07) == pytest.approx((0.93, 1.0))
    assert stats.share_interval(0.0, np.zeros(9), 0.07) == (0.0, 0.07)


def test_a_share_at_an_edge_whose_halves_scatter_stays_near_it() -> None:
    """The error is that of the halves, not divided by the little that is left to the edge."""
    halves = np.random.default_rng(0).binomial(25, 0.99, 200) / 25
    for value in (1.0, 0.9999):
        low, high = stats.share_interval(value, halves, 0.07)
        assert 0.9 < low < 0.99 and high == pytest.approx(1, abs=1e-3)
