"""Linkability: whether a cohort helps to find that two part-records are of one person."""

from __future__ import annotations

import numpy as np

from synthmed.metrics.records import Records, Targets
from synthmed.metrics.risk import Outcome, of_trials
from synthmed.metrics.stats import Bools, Floats, Ints


def linkability(tables: Targets) -> Outcome:
    """How often both halves of a patient have the same nearest sample.

    One holder has the labels and the upper half of the image, another the lower half. Numbers are
    in the cohort's standard deviations, a category that differs counts as one of these. Guessing:
    a sample drawn for each half. (With the three nearest samples of each half, real strangers were
    linked nine times in ten, since halves of one scan go together: no room is left for a risk.)

    Source: Article 29 Working Party, Opinion 05/2014; Giomi et al. 2023.
    """
    train, holdout = linked(tables, tables.train), linked(tables, tables.holdout)
    return Outcome(
        of_trials(int(train.sum()), len(train)),
        of_trials(int(holdout.sum()), len(holdout)),
        1 / len(tables.cohort),
        len(train),
        len(holdout),
    )


def linked(tables: Targets, people: Records) -> Bools:
    """(n,) whose two halves lead to one sample."""
    cohort = tables.cohort
    scale = _scale(tables)
    above = _nearest(_upper(people, tables, scale), _upper(cohort, tables, scale))
    below = _nearest(people.lower, cohort.lower)
    return np.asarray(above == below)


def _nearest(people: Floats, cohort: Floats) -> Ints:
    """(n,) the nearest sample of each."""
    from scipy.spatial.distance import cdist

    return np.asarray(np.argmin(cdist(people, cohort), axis=1), dtype=np.int64)


def _scale(tables: Targets) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each number in the cohort; of its range where that is 0."""
    out = {}
    for name, (low, high) in tables.continuous.items():
        known = [float(v) for r in tables.cohort.labels if (v := r.get(name)) is not None]
        sd = float(np.std(known)) if known else 0.0
        middle = float(np.mean(known)) if known else (low + high) / 2
        out[name] = middle, sd if sd > 0 else (high - low) or 1.0
    return out


def _upper(people: Records, tables: Targets, scale: dict[str, tuple[float, float]]) -> Floats:
    """Upper half and labels as numbers; what is not known is in the middle of everything."""
    columns = []
    for name, (middle, sd) in scale.items():
        values = (r.get(name) for r in people.labels)
        columns.append([0.0 if v is None else (float(v) - middle) / sd for v in values])
    for name, known in tables.categorical.items():
        for category in known:
            # two that differ are 1 apart
            columns.append([np.sqrt(0.5) * (r.get(name) == category) for r in people.labels])
    own = np.array(columns, dtype=np.float64).reshape(len(columns), len(people)).T
    return np.concatenate([people.upper, own], axis=1)
