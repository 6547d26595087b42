"""Distances of two cohorts by a kernel, unbiased, patient by patient: what mmd2 and kid share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.stats import (
    Floats,
    distance_interval,
    jackknife_se,
    normal_interval,
    permutation_p,
    permuted_labels,
)

Kernel = Callable[[Side, Side], Floats]
"""(scans of the first side, scans of the second) values of a kernel."""

Interval = tuple[float, float]

FEWEST = 3
"""Patients a side without which nothing can be left out of an average over pairs."""

REASON = "fewer than three patients on a side"


@dataclass(frozen=True)
class Discrepancy:
    """A squared distance of distributions and what it is read beside.

    Args:
        reference: the real side that the synthetic one was compared with: held out, or train
            where nobody is.
        told: how many patients it has, for the note.
        value: synthetic against the reference.
        ci: 95 % interval of it, by leaving out one patient at a time on every side, and by how it
            scatters where nothing differs.
        p: of a permutation test for equal distributions.
        floor: real train against the holdout; null without a holdout, as is all that follows.
        ceiling: the blurred holdout against train.
        excess: value minus floor, paired on one holdout.
        excess_ci: 95 % interval of it.
    """

    reference: Side
    told: str
    value: float
    ci: Interval
    p: float
    floor: float | None = None
    ceiling: float | None = None
    excess: float | None = None
    excess_ci: Interval | None = None

    @property
    def note(self) -> str:
        """What limits the figure."""
        told = f"permutation p = {self.p:.3g} for equal distributions; "
        told += f"n = {self.told} {self.reference} patients"
        if self.floor is not None:
            return told
        lacking = "no held-out patients: against train, where copies score perfectly"
        return f"{lacking}; no floor and no ceiling; {told}"


def discrepancy(shared: Shared, kernel: Kernel, times: int, key: Key) -> Discrepancy | None:
    """The synthetic side against the holdout; null with fewer than `FEWEST` patients a side.

    Args:
        shared: the sides.
        kernel: between scans; taken as the mean over the pairs of scans of two patients.
        times: permutations.
        key: of the permutations.
    """
    real = shared.reference
    used: tuple[Side, ...] = ("synthetic", "train", real)
    if min(len(shared.patients(side)) for side in used) < FEWEST:
        return None

    def between(a: Side, b: Side) -> Floats:
        return by_patient(shared, a, b, kernel(a, b))

    k_ss, k_rr, k_sr = (
        between("synthetic", "synthetic"),
        between(real, real),
        between("synthetic", real),
    )
    value = mmd2(k_ss, k_rr, k_sr)
    se = jackknife_se(
        [
            without_each(k_ss) - 2 * cross_without_each(k_sr, 0),
            without_each(k_rr) - 2 * cross_without_each(k_sr, 1),
        ]
    )
    null = permuted_mmd2(k_ss, k_rr, k_sr, times, key.numpy())
    ci = distance_interval(value, se, float(null.std()))
    p = permutation_p(value, null)
    alone = Discrepancy(real, shared.counted(len(k_rr)), value, ci, p)
    if not shared.has_holdout:
        return alone
    k_tt, k_tr = between("train", "train"), between("train", "holdout")
    floor = mmd2(k_tt, k_rr, k_tr)
    excess_se = jackknife_se(
        [
            without_each(k_ss) - 2 * cross_without_each(k_sr, 0),
            without_each(k_tt) - 2 * cross_without_each(k_tr, 0),
            -2 * cross_without_each(k_sr, 1) + 2 * cross_without_each(k_tr, 1),
        ]
    )
    return replace(
        alone,
        floor=floor,
        ceiling=mmd2(between("blurred", "blurred"), k_tt, between("blurred", "train")),
        excess=value - floor,
        excess_ci=normal_interval(value - floor, excess_se),
    )


def by_patient(shared: Shared, a: Side, b: Side, kernel: Floats) -> Floats:
    """(patients of a, patients of b) mean over the pairs of scans of two patients.

    That is the average over all draws of one scan a patient, computed exactly. (Two scans of a
    person as two points would bias a distance up.)
    """
    for axis, side in enumerate((a, b)):
        groups = shared.patients(side)
        starts = [int(g[0]) for g in groups]
        sizes = np.array([len(g) for g in groups], dtype=np.float64)
        kernel = np.add.reduceat(kernel, starts, axis=axis)
        kernel /= sizes[:, None] if axis == 0 else sizes[None, :]
    return np.asarray(kernel)


def mmd2(k_xx: Floats, k_yy: Floats, k_xy: Floats) -> float:
    """Unbiased MMD^2 from three kernel matrices; the diagonals are not used."""
    return float(_within(k_xx) + _within(k_yy) - 2 * k_xy.mean())


def without_each(kernel: Floats) -> Floats:
    """(n,) mean of the off-diagonal kernel with patient i left out."""
    n = len(kernel)
    rows = kernel.sum(axis=1) - np.diag(kernel)
    return np.asarray((rows.sum() - 2 * rows) / ((n - 1) * (n - 2)))


def cross_without_each(kernel: Floats, axis: Literal[0, 1]) -> Floats:
    """Mean of the cross kernel with one patient left out, of the rows (0) or the columns (1)."""
    n, m = kernel.shape if axis == 0 else kernel.shape[::-1]
    return np.asarray((kernel.sum() - kernel.sum(axis=1 - axis)) / ((n - 1) * m))


def permuted_mmd2(
    k_xx: Floats, k_yy: Floats, k_xy: Floats, times: int, rng: np.random.Generator
) -> Floats:
    """(times,) MMD^2 after relabelling patients at random, sizes kept."""
    n, m = k_xy.shape
    pooled = np.block([[k_xx, k_xy], [k_xy.T, k_yy]])
    np.fill_diagonal(pooled, 0.0)
    x = permuted_labels(n, n + m, times, rng).astype(np.float64)
    y = 1 - x
    x_kernel, y_kernel = x @ pooled, y @ pooled
    xx = np.sum(x_kernel * x, axis=1) / (n * (n - 1))
    yy = np.sum(y_kernel * y, axis=1) / (m * (m - 1))
    xy = np.sum(x_kernel * y, axis=1) / (n * m)
    return np.asarray(xx + yy - 2 * xy)


def _within(kernel: Floats) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))
