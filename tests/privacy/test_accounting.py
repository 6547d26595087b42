"""Epsilon against closed forms, against numerical integration, and against the other direction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from synthmed.errors import UsageError
from synthmed.privacy.accounting import (
    EPSILON_ERROR,
    _Added,
    affordable,
    epsilon,
    epsilon_rdp,
    merged,
    noise_for,
)
from synthmed.privacy.ledger import Steps

DELTA = 1e-5


def gaussian_epsilon(sigma: float, n: int, delta: float) -> float:
    """Exact for n Gaussian mechanisms (Balle and Wang 2018, arXiv:1805.06530, theorem 8)."""
    mu = math.sqrt(n) / sigma

    def over(eps: float) -> float:
        return float(
            norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta
        )

    return float(brentq(over, 0, 200))


def one_step_delta(eps: float, q: float, sigma: float, removed: bool) -> float:
    """Delta of a single subsampled step by integrating the hockey stick divergence itself."""

    def densities(x: float) -> tuple[float, float]:
        without = norm.pdf(x, 0, sigma)
        return (1 - q) * without + q * norm.pdf(x, 1, sigma), without

    def excess(x: float) -> float:
        p, r = densities(x) if removed else densities(x)[::-1]
        return max(0.0, float(p - math.exp(eps) * r))

    return float(quad(excess, -12 * sigma, 1 + 12 * sigma, limit=500, points=[0, 0.5, 1])[0])


@pytest.mark.parametrize(("sigma", "n"), [(2.0, 1), (2.0, 30), (10.0, 200)])
def test_without_subsampling_it_is_the_gaussian_mechanism(sigma: float, n: int) -> None:
    exact = gaussian_epsilon(sigma, n, DELTA)
    found = epsilon([Steps(sigma, 1.0, n)], DELTA)
    assert exact <= found <= exact + 2 * EPSILON_ERROR


@pytest.mark.parametrize("q", [0.05, 0.5])
def test_a_step_is_at_least_either_direction(q: float) -> None:
    found = epsilon([Steps(0.8, q, 1)], 1e-3)
    deltas = [one_step_delta(found, q, 0.8, removed) for removed in (True, False)]
    assert max(deltas) <= 1e-3
    # and not by much: a little less epsilon would break one of them
    tighter = found - 2.5 * EPSILON_ERROR
    assert max(one_step_delta(tighter, q, 0.8, removed) for removed in (True, False)) > 1e-3


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 0.7), (0.6, 1.5), (1.0, 1.0)])
def test_the_loss_of_an_addition_has_the_distribution_of_its_formula(
    q: float, sigma: float
) -> None:
    """Against a hundred thousand drawn outputs (Dvoretzky, Kiefer and Wolfowitz' bound)."""
    x = np.random.default_rng(0).normal(0, sigma, 100_000)
    losses = -np.log(1 - q + q * np.exp((2 * x - 1) / (2 * sigma**2)))
    at = np.linspace(losses.min() - 1, losses.max() + 1, 301)
    drawn = np.searchsorted(np.sort(losses), at, side="right") / len(losses)
    assert np.abs(_Added(q, sigma).cdf(at) - drawn).max() < math.sqrt(math.log(2e4) / 2e5)


@pytest.mark.parametrize(
    "spent", [[Steps(1.0, 0.1, 100)], [Steps(3, 0.5, 40), Steps(0.9, 0.02, 300)]]
)
def test_renyi_accounting_agrees_from_above(spent: list[Steps]) -> None:
    numeric, renyi = epsilon(spent, DELTA), epsilon_rdp(spent, DELTA)
    assert numeric <= renyi <= 1.25 * numeric


def test_more_costs_more_and_nothing_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon_rdp([], DELTA) == epsilon([Steps(1, 0.1, 0)], DELTA) == 0
    base = epsilon([Steps(2, 0.2, 50)], DELTA)
    assert epsilon([Steps(2, 0.2, 60)], DELTA) > base
    assert epsilon([Steps(2, 0.3, 50)], DELTA) > base
    assert epsilon([Steps(1.5, 0.2, 50)], DELTA) > base
    assert epsilon([Steps(2, 0.2, 50)], 1e-7) > base
    parts = [Steps(2, 0.2, 20), Steps(4, 0.1, 0), Steps(2, 0.2, 30)]
    assert merged(parts) == [Steps(2, 0.2, 50)]
    assert epsilon(parts, DELTA) == base


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_is_as_much_as_a_promise_needs(target: float) -> None:
    sigma = noise_for(target, DELTA, 0.3, 40)
    assert 0.99 * target < epsilon([Steps(sigma, 0.3, 40)], DELTA) <= target
    with pytest.raises(UsageError, match="no noise keeps 40 steps"):
        noise_for(1e-9, DELTA, 0.3, 40)


def test_what_is_left_counts_what_was_spent() -> None:
    step = Steps(2.0, 0.2, 60)
    promise = epsilon([step._replace(n=40)], DELTA)
    assert affordable([], step, promise, DELTA) == 40
    assert affordable([step._replace(n=25)], step, promise, DELTA) == 15
    assert affordable([step._replace(n=40)], step, promise, DELTA) == 0
    assert affordable([step._replace(n=90)], step, promise, DELTA) == 0
    assert affordable([], step._replace(n=30), promise, DELTA) == 30


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([Steps(1, 0.1, 1)], delta)
