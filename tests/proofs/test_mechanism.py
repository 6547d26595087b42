"""The six bugs that a private mechanism must not have are found; an honest one raises no alarm."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from synthmed.privacy import oracle
from tests.proofs import mechanism


@pytest.mark.parametrize("bug", mechanism.BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    assert mechanism.found(bug, seed=0)


def test_honest_runs_raise_no_alarm() -> None:
    assert [mechanism.alarms(seed) for seed in range(20)] == [[]] * 20


def test_hooks_are_right_where_padding_is_zero() -> None:
    """The control: it is the padding that is found, not the way to ask the hooks."""
    model = mechanism.Network("zeros")
    with mock.patch.object(oracle, "per_patient", mechanism.hooked(model)):
        assert mechanism.alarms(0, model) == []


def test_an_honest_training_pays_for_all_that_it_draws(tmp_path: Path) -> None:
    assert mechanism.unpaid(tmp_path) == 0
