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
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints, half, half_se, normal_interval
from synthmed.types import Estimate

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
        halves: (resamples, figures) on random halves of the patients; null when there are too few.
        floor: the figures of real train against the same holdout; null without a holdout.
        ceiling: those of the blurred holdout against train; null without a holdout.
        reference: which real side the synthetic side was compared with.
    """

    count: int
    value: Floats
    halves: Floats | None
    floor: Floats | None
    ceiling: Floats | None
    reference: Side

    @property
    def se(self) -> Floats | None:
        """Standard errors of the figures, null when there are too few patients for halves."""
        if self.halves is None:
            return None
        return np.array([half_se(column) for column in self.halves.T])

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
        return "" if self.halves is not None else "too few patients for an interval"


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
    reference = shared.reference
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
    halves: list[Floats] = []
    if count // 2 >= smallest:
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
    each = np.array(halves) if halves else None
    return Compared(count, value, each, floor, ceiling, reference)


def one_distance(
    name: str,
    what: str,
    unit: str,
    found: Compared | None,
    sides: Sides,
    shared: Shared,
    smallest: int = 2,
) -> Estimate:
    """The estimate of a single distance compared at equal counts; lower is better."""
    value, ci, floor, ceiling = _first(found, 0.0)
    method, note = f"{what}.", _too_few(smallest)
    if found is not None:
        method = (
            f"{what}, synthetic against {found.against} patients, {shared.counted(found.count)} a "
            "side; floor: "
            f"real train against the same; ceiling: {shared.control}; interval from halves of the "
            "patients."
        )
        note = found.limits
    return Estimate(
        name=name,
        group="fidelity",
        value=value,
        ci=ci,
        unit=unit,
        n=len(shared.patients("synthetic")),
        better="lower",
        floor=floor,
        ceiling=ceiling,
        method=method,
        seed=sides.seed,
        note=note,
        n_holdout=shared.n_holdout,
    )


def one_variety(
    name: str,
    what: str,
    unit: str,
    found: Compared | None,
    least: float,
    sides: Sides,
    shared: Shared,
    scale: Callable[[float], float] = float,
) -> Estimate:
    """The estimate of how various scans are at equal counts; best as various as real train.

    Args:
        name: of the estimate.
        what: the figure in words.
        unit: of it.
        found: with real train in the place of the candidate as its floor.
        least: the figure of one scan over and over.
        sides: what is compared.
        shared: their caches.
        scale: from what was compared to what is told, increasing.
    """
    value, ci, floor, _ = _first(found, least)
    value, floor = (None if x is None else scale(x) for x in (value, floor))
    ci = None if ci is None else (scale(ci[0]), scale(ci[1]))
    method, note = f"{what}.", _too_few(2)
    if found is not None:
        method = (
            f"{what} among {shared.counted(found.count)} synthetic scans; floor and target: among "
            "as many training patients; ceiling: one scan over and over; interval from halves of "
            "the patients."
        )
        note = found.limits
    return Estimate(
        name=name,
        group="fidelity",
        value=value,
        ci=ci,
        unit=unit,
        n=len(shared.patients("synthetic")),
        better="match",
        target=floor,
        floor=floor,
        ceiling=scale(least),
        method=method,
        seed=sides.seed,
        note=note,
        n_holdout=shared.n_holdout,
    )


def _first(
    found: Compared | None, least: float
) -> tuple[float | None, tuple[float, float] | None, float | None, float | None]:
    """Value, interval, floor and ceiling of the only figure."""
    if found is None:
        return None, None, None, None
    value = float(found.value[0])
    ci = None if found.se is None else normal_interval(value, float(found.se[0]), least)
    floor = None if found.floor is None else float(found.floor[0])
    return value, ci, floor, None if found.ceiling is None else float(found.ceiling[0])


def _too_few(smallest: int) -> str:
    number = {2: "two", 10: "ten"}.get(smallest, str(smallest))
    return f"a side has fewer than {number} patients"


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
    # also where both sides are equal and a third one is smaller
    left_out = count < max(len(a_groups), len(b_groups))
    choice = left_out or any(len(g) > 1 for g in (*a_groups, *b_groups))
    total: Floats = np.zeros(())
    times = draws if choice else 1
    for _ in range(times):
        rows = []
        for groups in (a_groups, b_groups):
            chosen = np.sort(rng.permutation(len(groups))[:count])
            rows.append(pick([groups[i] for i in chosen], rng))
        total = total + statistic(a, rows[0], b, rows[1])
    return np.asarray(total / times, dtype=np.float64)
