"""The audit: bounds that hold and find something, and records that give planted bugs away."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result
from scipy.stats import binom

from synthmed.errors import SynthmedError
from synthmed.keys import Key
from synthmed.privacy import patient_step
from synthmed.privacy.accounting import noise_for
from synthmed.privacy.audit import (
    LEVEL,
    Check,
    canaries,
    guesses,
    lower_bound,
    records,
    two_worlds,
    worlds_bound,
)
from synthmed.privacy.patient_step import Mechanism
from tests.proofs.mechanism import (
    CLAIMED,
    N_PARAMETERS,
    N_PATIENTS,
    N_STEPS,
    Half,
    Unclipped,
    log_of,
    parameters,
)

DELTA = 1e-5


# --- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 200])
def test_without_delta_the_bound_is_that_of_a_binomial(n: int) -> None:
    """Exactly: the epsilon at which so many right guesses have probability `LEVEL`."""
    for right in (n // 2, int(0.8 * n), n):
        bound = lower_bound(1000, n, right, 0.0)
        if binom.sf(right - 1, n, 0.5) >= LEVEL:
            assert bound == 0
            continue
        for eps, above in ((bound - 2e-3, False), (bound + 2e-3, True)):
            assert (binom.sf(right - 1, n, 1 / (1 + math.exp(-eps))) >= LEVEL) == above


def test_a_larger_delta_and_fewer_hits_bound_less() -> None:
    full = lower_bound(1000, 100, 98, 1e-6)
    assert full > lower_bound(1000, 100, 98, 1e-4) > lower_bound(1000, 100, 98, 1e-3)
    assert full > lower_bound(1000, 100, 90, 1e-6) > lower_bound(1000, 100, 60, 1e-6)
    assert lower_bound(1000, 100, 50, 1e-6) == 0


def test_randomised_response_is_bounded_rightly() -> None:
    """The mechanism that the bound is tight for: it exceeds the truth in 5 % of audits at most."""
    rng, eps, n = np.random.default_rng(0), 1.5, 400
    right = rng.binomial(n, 1 / (1 + math.exp(-eps)), 2000)
    table = {k: lower_bound(n, n, int(k), 0.0) for k in np.unique(right)}
    bounds = np.array([table[k] for k in right])
    assert (bounds > eps).mean() <= LEVEL + 4 * math.sqrt(LEVEL / 2000)
    assert bounds.mean() > 0.8 * eps


# --- canaries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "share"), [(0.5, 0.24), (1.0, 0.29)])
def test_canaries_find_much_of_the_claim_and_never_more(q: float, share: float) -> None:
    """Over 20 seeds 0.300 and 0.349 of it are found; means of five lie within 4 deviations."""
    claim = 8.0
    mechanism = Mechanism(q, noise_for(claim, DELTA, q, 20), clip=0.7, divisor=50.0)
    found = [canaries(parameters(), mechanism, 20, 1000, DELTA, Key.root(k)) for k in range(5)]
    bounds = [f["epsilon_lower_bound"] for f in found]
    assert max(bounds) <= claim
    assert np.mean(bounds) >= share * claim
    assert all(f["best_possible"] >= f["epsilon_lower_bound"] for f in found)
    again = canaries(parameters(), mechanism, 20, 1000, DELTA, Key.root(0))
    assert again == found[0]


def test_the_number_of_guesses_is_a_function_of_public_constants() -> None:
    mechanism = Mechanism(0.5, 2.0, 1.0, 10.0)
    n = guesses(1000, mechanism, 20, DELTA)
    assert n == guesses(1000, mechanism, 20, DELTA) and 10 < n < 500 and n % 2 == 0
    assert guesses(1000, mechanism, 200, DELTA) > n, "easier to tell apart: more are guessed"


def test_noise_that_is_missing_is_found_by_canaries() -> None:
    """Half the noise of the claim: the bound rises above what was promised."""
    claim = 1.0
    honest = Mechanism(1.0, noise_for(claim, DELTA, 1.0, 20), clip=1.0, divisor=50.0)
    weak = Mechanism(1.0, honest.noise_multiplier / 6, clip=1.0, divisor=50.0)
    assert (
        canaries(parameters(), honest, 20, 1000, DELTA, Key.root(1))["epsilon_lower_bound"] <= claim
    )
    assert canaries(parameters(), weak, 20, 1000, DELTA, Key.root(1))["epsilon_lower_bound"] > claim


def test_canaries_need_room() -> None:
    with pytest.raises(ValueError, match="5000 canaries need as many parameters"):
        canaries(parameters(), Mechanism(1.0, 1.0, 1.0, 1.0), 1, 5000, DELTA, Key.root(0))


# --- two worlds -----------------------------------------------------------------------------------


def test_the_bound_of_two_worlds_holds_for_randomised_response() -> None:
    """Told apart at exactly e^epsilon: the bound exceeds that in 5 % of audits at most."""
    rng, eps, n = np.random.default_rng(0), 1.0, 400
    right = 1 / (1 + math.exp(-eps))
    counts = zip(rng.binomial(n, right, 2000), rng.binomial(n, 1 - right, 2000), strict=True)
    bounds = np.array([worlds_bound(int(a), int(b), n, 0.0) for a, b in counts])
    assert (bounds > eps).mean() <= LEVEL + 4 * math.sqrt(LEVEL / 2000)
    assert bounds.mean() > 0.5 * eps
    assert worlds_bound(200, 200, n, 0.0) == 0
    assert worlds_bound(400, 0, n, 0.0) > worlds_bound(400, 0, n, 0.01) > 4
    assert worlds_bound(0, 400, n, 0.0) == 0, "wrong every time is not said to be known"


def test_two_worlds_find_something_and_never_more_than_the_claim() -> None:
    mechanism = Mechanism(1.0, noise_for(8.0, DELTA, 1.0, 4), clip=0.7, divisor=50.0)
    found = [two_worlds(mechanism, 4, DELTA, 120, Key.root(k)) for k in range(3)]
    bounds = [f["epsilon_lower_bound"] for f in found]
    assert np.mean(bounds) > 0.5 and max(bounds) <= 8.0
    assert two_worlds(mechanism, 4, DELTA, 120, Key.root(0)) == found[0]


def test_noise_that_is_missing_is_found_by_two_worlds() -> None:
    """A twentieth of the noise of the claim: the bound rises above what was promised."""
    claim = 1.0
    honest = Mechanism(1.0, noise_for(claim, DELTA, 1.0, 4), clip=1.0, divisor=50.0)
    weak = Mechanism(1.0, honest.noise_multiplier / 20, clip=1.0, divisor=50.0)
    assert two_worlds(honest, 4, DELTA, 80, Key.root(1))["epsilon_lower_bound"] <= claim
    assert two_worlds(weak, 4, DELTA, 80, Key.root(1))["epsilon_lower_bound"] > claim


# --- the records of a run, and planted bugs -------------------------------------------------------


def verdicts(lines: list[dict[str, float]], n_charged: int = N_STEPS) -> dict[str, Check]:
    checks = records(lines, "x", CLAIMED, N_PATIENTS, N_PARAMETERS, n_charged)
    return {c.name: c for c in checks}


def test_an_honest_run_raises_no_alarm() -> None:
    """A hundred runs: at 1e-4 a check, one alarm among them is already unlikely."""
    alarms = sum(not c.passed for seed in range(100) for c in verdicts(log_of(seed)).values())
    assert alarms == 0


def test_half_the_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_step, "_Optimizer", Half)
    found = verdicts(log_of(0))
    assert not found["noise variance"].passed
    assert sum(not c.passed for c in found.values()) == 1


def test_a_clip_that_is_missing_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed; and where such a step were logged, its record tells."""
    monkeypatch.setattr(patient_step, "_Optimizer", Unclipped)
    with pytest.raises(SynthmedError, match="the sum of clipped gradients is off by"):
        log_of(0)
    monkeypatch.setattr(patient_step, "allowed_off", lambda n: math.inf)
    found = verdicts(log_of(0))
    assert [c.name for c in found.values() if not c.passed] == ["sum of contributions, off by"]


def test_another_rate_is_found() -> None:
    assert not verdicts(log_of(0, rate=0.4))["inclusion rate"].passed


def test_a_step_that_was_not_paid_for_is_found() -> None:
    """As when a step drawn afresh on resume is charged once."""
    assert not verdicts(log_of(0), n_charged=N_STEPS - 1)["steps charged"].passed


def test_what_is_no_run_is_not_audited(synthmed: Callable[..., Result], tmp_path: Path) -> None:
    result = synthmed("audit", tmp_path)
    assert result.code == 2 and "no run in this folder" in result.err
