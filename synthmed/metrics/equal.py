"""Figures that move with the number of patients, compared at equal counts.

k-NN figures grow with n, and the distance between two sample means shrinks with it, so a figure
and its floor speak of the same thing only when reference and candidate hold the same number of
patients. All patients are used by averaging over keyed draws of that many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.shared import Shared, Side, pick
from synthmed.metrics.stats import Floats, Ints, half, half_se

Statistic = Callable[[Side, Ints, Side, Ints], Floats]
"""(reference side, its scans, candidate side, its scans) -> the figures, one scan a patient."""

INNER_DRAWS = 4
"""Draws behind each figure of a half sample; fewer only widen the interval."""


@dataclass(frozen=True)
class Compared:
    """Figures of the synthetic side beside the two controls.

    Args:
        count: patients on each side of every comparison.
        value: the figures of the synthetic side.
        se: their standard errors, null when there are too few patients for halves.
        floor: the figures of real train against the same holdout; null without a holdout.
        ceiling: those of the blurred holdout against train; null without a holdout.
        reference: which real side the synthetic side was compared with.
    """

    count: int
    value: Floats
    se: Floats | None
    floor: Floats | None
    ceiling: Floats | None
    reference: Side

    @property
    def against(self) -> str:
        """The reference in words, for the method sentence."""
        return "held-out" if self.reference == "holdout" else "training"

    @property
    def limits(self) -> str:
        """What could not be computed, and why."""
        if self.floor is None:
            return (
                "no held-out patients: compared with train, where copies score perfectly; "
                "no floor and no ceiling"
            )
        return "" if self.se is not None else "too few patients for an interval"


def compare(
    shared: Shared, statistic: Statistic, label: str, draws: int, smallest: int
) -> Compared | None:
    """The synthetic side against the holdout, floor and ceiling, all at equal counts.

    Figure and floor share the holdout, so that what is peculiar to it moves both; without a
    holdout the reference is train. Null when a side has fewer than `smallest` patients; no
    interval when half of one does.

    Args:
        shared: the sides.
        statistic: what is compared.
        label: folded into the key, one a metric.
        draws: picks that a figure is averaged over.
        smallest: fewest patients a side for which the statistic is defined.
    """
    key = shared.sides.key.fold(label)
    reference: Side = "holdout" if shared.has_holdout else "train"
    real, made = shared.patients(reference), shared.patients("synthetic")
    train = shared.patients("train")
    sizes = [len(real), len(made), len(train)]
    count = min(sizes)
    if count < smallest:
        return None

    def figure(a: Side, b: Side, key: Key) -> Floats:
        return _mean(statistic, a, shared.patients(a), b, shared.patients(b), count, draws, key)

    value = figure(reference, "synthetic", key.fold("value"))
    floor = ceiling = None
    if shared.has_holdout:
        floor = figure("holdout", "train", key.fold("floor"))
        ceiling = figure("train", "blurred", key.fold("ceiling"))
    se = None
    if count // 2 >= smallest:
        halves = []
        for i in range(shared.sides.resamples):
            rng = key.fold("half", i).numpy()
            a = [real[j] for j in half(len(real), rng)]
            b = [made[j] for j in half(len(made), rng)]
            halves.append(
                _mean(
                    statistic,
                    reference,
                    a,
                    "synthetic",
                    b,
                    min(len(a), len(b)),
                    INNER_DRAWS,
                    key.fold("inner", i),
                )
            )
        se = np.array([half_se(column) for column in np.array(halves).T])
    return Compared(count, value, se, floor, ceiling, reference)


def _mean(
    statistic: Statistic,
    a: Side,
    a_groups: Sequence[Ints],
    b: Side,
    b_groups: Sequence[Ints],
    count: int,
    draws: int,
    key: Key,
) -> Floats:
    """The statistic averaged over draws of `count` patients of each side, one scan a patient."""
    rng = key.numpy()
    choice = any(len(g) > 1 for g in (*a_groups, *b_groups)) or len(a_groups) != len(b_groups)
    total: Floats = np.zeros(())
    times = draws if choice else 1
    for _ in range(times):
        rows = []
        for groups in (a_groups, b_groups):
            chosen = np.sort(rng.permutation(len(groups))[:count])
            rows.append(pick([groups[i] for i in chosen], rng))
        total = total + statistic(a, rows[0], b, rows[1])
    return np.asarray(total / times, dtype=np.float64)
