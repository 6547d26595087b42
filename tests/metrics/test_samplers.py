"""Honest samplers pass the copies test; the long form is tests/proofs/screen_sampler.py."""

from __future__ import annotations

from tests.proofs.screen_sampler import run


def test_honest_samplers_raise_no_alarm() -> None:
    # at a true rate of 1 % the chance of two or more alarms in 4 cohorts is 0.06 %
    alarms = run(4)
    assert len(alarms) == 10 and max(alarms.values()) <= 1, alarms
