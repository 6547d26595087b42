"""What steps of the Poisson-subsampled Gaussian mechanism cost, and how much noise a promise needs.

Numerical composition of privacy loss random variables (Gopi et al. 2021, arXiv:2106.02848) by
Opacus, whose accountant looks at one of the two neighbouring cohorts alone: that from which a
patient is removed. Here the other one, to which a patient is added, is composed as well and the
larger epsilon counts. Renyi accounting (Mironov et al. 2019, arXiv:1908.10530) is the cross-check.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.prv import (
    DiscretePRV,
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    compute_safe_domain_size,
    discretize,
)
from scipy.optimize import brentq
from scipy.special import erfc

from synthmed.errors import UsageError
from synthmed.metrics.stats import Floats
from synthmed.privacy.ledger import Steps

EPSILON_ERROR = 0.01
"""By how much the printed epsilon may exceed the exact one; it never falls below it."""
MOST_NOISE = 1e4
"""Noise multiplier beyond which a promise counts as impossible."""
CURVE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Deltas that a report gives epsilon for, beside the declared one."""


@dataclass(frozen=True)
class _Added:
    """Privacy loss of a step where the neighbouring cohort has a patient more.

    The output is x ~ N(0, sigma^2) and the loss log N(0, sigma^2) / ((1 - q) N(0, sigma^2) + q N(1,
    sigma^2)) = -log(1 - q + q exp((2 x - 1) / (2 sigma^2))), never above -log(1 - q).
    """

    sample_rate: float
    noise_multiplier: float

    def cdf(self, t: Floats) -> Floats:
        """P(loss <= t)."""
        q, sigma = self.sample_rate, self.noise_multiplier
        inside = np.exp(-np.asarray(t, float)) - (1 - q)
        z = np.log(np.where(inside > 0, inside, 1) / q)
        tail = erfc((sigma**2 * z + 0.5) / (sigma * math.sqrt(2))) / 2
        return np.where(inside > 0, tail, 1.0)


def epsilon(spent: Sequence[Steps], delta: float) -> float:
    """Epsilon of all these steps together on one patient, at this delta, in either direction.

    Guarantee: an upper bound, at most `EPSILON_ERROR` and a thousandth of delta above the exact
    value; 0 where nothing was spent.

    Raises:
        ValueError: delta is not within (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}: expected a number between 0 and 1")
    history = merged(spent)
    if not history:
        return 0.0
    both = (PoissonSubsampledGaussianPRV, _Added)
    return max(_composed(tuple(history), delta, kind) for kind in both)


def epsilon_rdp(spent: Sequence[Steps], delta: float) -> float:
    """The same by Renyi divergences: a looser bound, from other mathematics and other code."""
    history = merged(spent)
    if not history:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = [tuple(s) for s in history]
    with warnings.catch_warnings():
        # at the ends of the range of orders the bound is loose, not wrong
        warnings.filterwarnings("ignore", message="Optimal order is")
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def noise_for(target: float, delta: float, sample_rate: float, n_steps: int) -> float:
    """The smallest noise multiplier (to a thousandth) whose steps keep epsilon at `target`.

    Raises:
        UsageError: even `MOST_NOISE` would not do.
    """

    def over(log_sigma: float) -> float:
        return epsilon([Steps(math.exp(log_sigma), sample_rate, n_steps)], delta) / target - 1

    low, high = math.log(0.5), math.log(1.0)
    while over(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(MOST_NOISE):
            raise UsageError(
                f"privacy: no noise keeps {n_steps} steps at rate {sample_rate:g} within epsilon "
                f"{target:g} at delta {delta:g}",
                "Raise privacy.epsilon, lower privacy.sample_rate, or take fewer train.max_steps.",
            )
    while over(low) <= 0:
        low, high = low - math.log(2), low
    found = float(brentq(over, low, high, xtol=5e-4))
    while over(found) > 0:  # the root may lie on either side
        found += 5e-4
    return math.exp(found)


def affordable(spent: Sequence[Steps], step: Steps, promise: float, delta: float) -> int:
    """How many of `step.n` steps somebody who has spent this can still take within the promise."""
    low, high = 0, step.n
    if epsilon([*spent, step], delta) <= promise:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon([*spent, step._replace(n=middle)], delta) <= promise:
            low = middle
        else:
            high = middle
    return low


def merged(spent: Sequence[Steps]) -> list[Steps]:
    """Steps of one mechanism added up; an order that does not depend on when they were taken."""
    totals: dict[tuple[float, float], int] = {}
    for s in spent:
        at = (s.noise_multiplier, s.sample_rate)
        totals[at] = totals.get(at, 0) + s.n
    return [Steps(sigma, q, n) for (sigma, q), n in sorted(totals.items()) if n]


@lru_cache(maxsize=1024)
def _composed(history: tuple[Steps, ...], delta: float, kind: Callable[..., object]) -> float:
    losses = [kind(s.sample_rate, s.noise_multiplier) for s in history]
    times = [s.n for s in history]
    delta_error = delta / 1000
    # the Renyi divergence of a removal bounds that of an addition, so this domain is wide enough
    # for both (Mironov et al. 2019, theorem 5)
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is")
        reach = compute_safe_domain_size(losses, times, EPSILON_ERROR, delta_error)
        mesh = EPSILON_ERROR / math.sqrt(sum(times) * math.log(12 / delta_error) / 2)
        domain = Domain.create_aligned(-reach, reach, mesh)
        cut = [TruncatedPrivacyRandomVariable(x, domain.t_min, domain.t_max) for x in losses]
        whole: DiscretePRV = compose_heterogeneous([discretize(x, domain) for x in cut], times)
    *_, upper = whole.compute_epsilon(delta, delta_error, EPSILON_ERROR)
    return float(upper)
