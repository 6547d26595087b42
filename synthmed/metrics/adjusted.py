"""Volumes given the labels: what is left of them when what labels explain is taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from synthmed.metrics.stats import Floats
from synthmed.types import Labels

PEOPLE_A_NUMBER = 5
"""Training patients that the fit needs for each number it finds."""


def encoded(
    labels: Sequence[Labels],
    categorical: Mapping[str, Sequence[str]],
    continuous: Mapping[str, tuple[float, float]],
) -> Floats:
    """(n, K) of labels: a 1 at each category but the first, a number from 0 to 1 over its range.

    The first column is 1. A label that is not known is zero, with a column of its own that says so
    where any is missing; a number then counts as the middle of its range.
    """
    columns = [np.ones(len(labels))]
    for name, categories in categorical.items():
        values = [x.get(name) for x in labels]
        columns += [np.array([v == c for v in values], float) for c in categories[1:]]
        columns.append(np.array([v is None for v in values], float))
    for name, (low, high) in continuous.items():
        known = [x.get(name) for x in labels]
        columns.append(
            np.array([0.5 if v is None else (float(v) - low) / (high - low) for v in known])
        )
        columns.append(np.array([v is None for v in known], float))
    return np.stack(columns, axis=1)


def without_labels(design: Floats, volumes: Floats) -> Callable[[Floats, Floats], Floats] | None:
    """What takes from log volumes the part that labels explain in some people.

    Least squares of log(1 + volume) on the labels; a difference of 0.1 is about 10 % of a volume.

    Args:
        design: (n, K) of `encoded`.
        volumes: (n, regions) in cubic millimetres.

    Returns:
        (m, K) and (m, regions) to (m, regions); null with fewer than `PEOPLE_A_NUMBER` people for
        each column that is used.
    """
    used = np.flatnonzero(np.any(design != 0, axis=0))
    if len(design) < PEOPLE_A_NUMBER * len(used):
        return None
    weights, *_ = np.linalg.lstsq(design[:, used], np.log1p(volumes), rcond=None)

    def left(labels: Floats, of: Floats) -> Floats:
        return np.asarray(np.log1p(of) - labels[:, used] @ weights)

    return left
