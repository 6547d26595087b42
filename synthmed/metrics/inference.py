"""Attribute inference: whether a cohort tells a patient's label to who has the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synthmed.metrics.records import Records, Targets
from synthmed.metrics.risk import Outcome, of_trials
from synthmed.metrics.stats import Bools, Floats

TOLERANCE = 0.1
"""How wrong a number may be, as a part of its declared range."""
FEWEST = 3
"""People with a known label without whom a side says nothing."""


def inference(tables: Targets, condition: str) -> Outcome | None:
    """How often the label of the sample with the nearest image is the patient's own.

    A category has to be the same, a number within a tenth of its declared range. Guessing: the
    label of any sample. People and samples whose label is not known are left out; null where that
    leaves fewer than three on a side.

    Source: Article 29 Working Party, Opinion 05/2014; Giomi et al. 2023.
    """
    cohort, said = _known(tables.cohort, condition)
    train, own = _known(tables.train, condition)
    holdout, theirs = _known(tables.holdout, condition)
    if min(len(said), len(own), len(theirs)) < FEWEST:
        return None
    told = _is_right(tables, condition, _guess(train, cohort, said), own)
    control = _is_right(tables, condition, _guess(holdout, cohort, said), theirs)
    any_sample = [_is_right(tables, condition, [label] * len(own), own).mean() for label in said]
    return Outcome(
        of_trials(int(told.sum()), len(told)),
        of_trials(int(control.sum()), len(control)),
        float(np.mean(any_sample)),
        len(told),
        len(control),
    )


def _known(people: Records, condition: str) -> tuple[Floats, list[Any]]:
    """Images and labels of whose label is known."""
    labels = [r.get(condition) for r in people.labels]
    rows = [i for i, label in enumerate(labels) if label is not None]
    return people.image[rows], [labels[i] for i in rows]


def _guess(people: Floats, cohort: Floats, said: Sequence[Any]) -> list[Any]:
    from scipy.spatial.distance import cdist

    return [said[i] for i in np.argmin(cdist(people, cohort), axis=1)]


def _is_right(tables: Targets, condition: str, guess: Sequence[Any], own: Sequence[Any]) -> Bools:
    if condition in tables.categorical:
        return np.array([g == o for g, o in zip(guess, own, strict=True)], dtype=bool)
    low, high = tables.continuous[condition]
    apart = np.abs(np.array(guess, dtype=np.float64) - np.array(own, dtype=np.float64))
    return np.asarray(apart <= TOLERANCE * (high - low) * (1 + 1e-9))
