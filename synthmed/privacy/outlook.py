"""What a promise leaves to learn from, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from synthmed.config import Privacy
from synthmed.privacy.accounting import noise_for

POOR, HOPELESS = 0.2, 0.05
"""Signal to noise of a step below which a network learns little, and next to nothing."""


def outlook(promise: Privacy, n_steps: int, n_parameters: int) -> dict[str, Any]:
    """Noise, and how much of it there is beside what patients tell, in one step.

    A step adds up about q n gradients of norm C at most and noise of deviation sigma C in each of
    d parameters, so signal over noise is at most q n / (sigma sqrt(d)), where all patients agree.

    Args:
        promise: the privacy block; n is the declared number of patients.
        n_steps: of phases that read patients.
        n_parameters: trained by them.
    """
    spend = promise.spend or promise.epsilon
    sigma = noise_for(spend, promise.delta, promise.sample_rate, n_steps)
    signal = promise.sample_rate * promise.patients / (sigma * math.sqrt(n_parameters))
    return {
        "epsilon": spend,
        "delta": promise.delta,
        "noise_multiplier": round(sigma, 4),
        "steps": n_steps,
        "n_parameters": n_parameters,
        "signal_to_noise": round(signal, 4),
        "verdict": verdict(signal),
    }


def verdict(signal: float) -> str:
    """In plain words.

    >>> verdict(0.01)[:31]
    'next to nothing can be learned:'
    """
    advice = (
        "train fewer parameters, declare (and have) more patients, take fewer steps, or raise "
        "epsilon"
    )
    if signal < HOPELESS:
        return f"next to nothing can be learned: {advice}"
    if signal < POOR:
        return f"little can be learned: {advice}"
    return "there is something to learn from; the evidence will say how much came of it"


def describe(facts: Mapping[str, Any]) -> str:
    """Two lines for a person."""
    return (
        f"privacy    epsilon {facts['epsilon']:g} at delta {facts['delta']:g} over "
        f"{facts['steps']} steps needs a noise multiplier of {facts['noise_multiplier']:g}\n"
        f"           signal to noise of a step at most {facts['signal_to_noise']:g} for "
        f"{facts['n_parameters']} parameters: {facts['verdict']}"
    )
