"""What an attack on people's records is worth: its success beyond what the population gives away.

An attacker with a synthetic cohort guesses something of a patient. The guess may be right because
the cohort tells how people are, which is what it is for, or because it tells how this patient is.
Only training patients can be hurt in the second way; so the same attack is made on held-out ones,
and what it achieves there is taken off.

Source: Giomi et al. 2023, PoPETs 2023(2):312 (attack, control and baseline, and the risk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthmed.metrics.stats import Z95, Floats, jackknife_se

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """A success rate between 0 and 1 with its 95 % interval."""

    value: float
    ci: Interval


@dataclass(frozen=True)
class Outcome:
    """What an attack achieved.

    Args:
        train: its rate among training patients.
        control: the same among held-out patients.
        baseline: the rate of guessing without the cohort's help, among training patients.
        n_train: training patients asked about.
        n_control: held-out patients asked about.
    """

    train: Rate
    control: Rate
    baseline: float
    n_train: int
    n_control: int

    @property
    def is_weak(self) -> bool:
        """Whether even on training patients the attack does no better than guessing."""
        return self.train.ci[0] <= self.baseline


def wilson(successes: float, n: float) -> Interval:
    """95 % score interval of a proportion; counts may be fractional.

    Raises:
        ValueError: not 0 <= successes <= n, or n <= 0.

    Source: Wilson 1927.

    >>> [round(x, 4) for x in wilson(0, 50)]
    [0.0, 0.0713]
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson: {successes} of {n}, expected 0 <= successes <= n")
    p, z2 = successes / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    width = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    # 0 and 1 are exact ends, which rounding must not move past the value
    low = 0.0 if successes == 0 else max(0.0, middle - width)
    return low, 1.0 if successes == n else min(1.0, middle + width)


def of_trials(successes: int, n: int) -> Rate:
    """The rate of independent trials, one a patient."""
    return Rate(successes / n, wilson(successes, n))


def of_patients(value: float, without_each: Floats) -> Rate:
    """A rate that patients share in, from its values with each of them left out.

    Wilson's interval at the number of independent trials that has the jackknife's variance,
    n = p (1 - p) / se^2; the number of patients where there is no spread.

    Source: Korn and Graubard 1998 (effective counts).
    """
    se = jackknife_se([without_each])
    spread = value * (1 - value)
    n = spread / se**2 if se > 1e-12 and spread > 1e-12 else float(len(without_each))
    return Rate(value, wilson(value * n, n))


def risk(outcome: Outcome) -> tuple[float, Interval] | None:
    """(train - control) / (1 - control), and its 95 % interval.

    At most 1: every training patient is hurt whom the population alone would not have given away.
    Below 0 where the attack does better on strangers. Null where it succeeds on every one of these.

    The risk is 1 - q_t / q_c with q the rates of failure, so the interval is that of a ratio of two
    independent proportions, recovered from the Wilson interval of each (MOVER): a limit R solves
    (q_t - R q_c)^2 = (q_t - l_t)^2 + R^2 (u_c - q_c)^2 for the lower, with l and u exchanged for
    the upper one.

    Source: Giomi et al. 2023 (the risk); Donner and Zou 2012, Statistical Methods in Medical
    Research 21:347 (the interval).
    """
    q_t, q_c = 1 - outcome.train.value, 1 - outcome.control.value
    if q_c <= 0:
        return None
    low_t, high_t = 1 - outcome.train.ci[1], 1 - outcome.train.ci[0]
    low_c, high_c = 1 - outcome.control.ci[1], 1 - outcome.control.ci[0]
    product = q_t * q_c
    a, c = low_c * (2 * q_c - low_c), high_t * (2 * q_t - high_t)
    most = (product + math.sqrt(max(product**2 - a * c, 0.0))) / a
    a, c = high_c * (2 * q_c - high_c), low_t * (2 * q_t - low_t)
    # the smaller root, written so that a may be 0
    least = c / (product + math.sqrt(max(product**2 - a * c, 0.0))) if c > 0 else 0.0
    return 1 - q_t / q_c, (1 - most, 1 - least)
