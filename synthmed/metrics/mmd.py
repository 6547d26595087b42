"""mmd2: how far the synthetic cohort is from the held-out one, as distributions of descriptors."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import (
    Floats,
    jackknife_se,
    normal_interval,
    permutation_p,
    permuted_labels,
)
from synthmed.types import Estimate, Frozen


class MMD(Frozen):
    """Unbiased squared maximum mean discrepancy with an RBF kernel; lower is better, 0 is equal.

    MMD2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j), with
    k(a, b) = exp(-gamma |a - b|^2) on z-scored descriptors and gamma = 1 / (2 m^2), m the median
    distance between scans of two different patients of real train.

    k of two patients is the mean over their pairs of scans: that is the average over all draws of
    one scan a patient, computed exactly. (Two scans of a person as two points would bias it up.)

    - `mmd2`: synthetic against holdout, H. Floor: real train against H. Ceiling: H blurred by 0.4
      voxel against train.
    - `mmd2_excess`: MMD2(S, H) - MMD2(T, H), paired on one holdout. What is peculiar to H (its own
      term wholly) cancels, and since both parts are unbiased the difference is, whatever the
      three sizes. Floor 0; ceiling as above.

    Intervals leave out one patient at a time on every side (`stats.jackknife_se`).

    Source: Gretton et al. 2012, JMLR 13:723, equation 3.
    """

    name: Literal["mmd2"] = "mmd2"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """`mmd2` and `mmd2_excess`; null without two patients a side."""
        real: Side = "holdout" if shared.has_holdout else "train"
        used: list[Side] = ["synthetic", "train", real]
        n = len(shared.patients("synthetic"))
        n_holdout = len(shared.patients("holdout")) if shared.has_holdout else None
        if min(len(shared.patients(side)) for side in used) < 3:
            reason = "fewer than three patients on a side"
            return [
                self._estimate(name, None, None, n, None, None, sides, reason, n_holdout)
                for name in ("mmd2", "mmd2_excess")
            ]
        gamma = median_gamma(shared)
        k_ss = patient_kernel(shared, "synthetic", "synthetic", gamma)
        k_rr = patient_kernel(shared, real, real, gamma)
        k_sr = patient_kernel(shared, "synthetic", real, gamma)
        value = mmd2(k_ss, k_rr, k_sr)
        se = jackknife_se(
            [
                without_each(k_ss) - 2 * cross_without_each(k_sr, 0),
                without_each(k_rr) - 2 * cross_without_each(k_sr, 1),
            ]
        )
        rng = sides.key.fold("mmd2", "permutation").numpy()
        p = permutation_p(value, permuted_mmd2(k_ss, k_rr, k_sr, sides.resamples, rng))
        note = f"permutation p = {p:.3g} for equal distributions; n = {len(k_rr)} {real} patients"
        if not shared.has_holdout:
            lacking = "no held-out patients: against train, where copies score perfectly"
            return [
                self._estimate(
                    "mmd2",
                    value,
                    normal_interval(value, se),
                    n,
                    None,
                    None,
                    sides,
                    f"{lacking}; no floor and no ceiling; {note}",
                    None,
                ),
                self._estimate(
                    "mmd2_excess", None, None, n, None, None, sides, "no held-out patients", None
                ),
            ]
        k_tt = patient_kernel(shared, "train", "train", gamma)
        k_tr = patient_kernel(shared, "train", "holdout", gamma)
        floor = mmd2(k_tt, k_rr, k_tr)
        ceiling = mmd2(
            patient_kernel(shared, "blurred", "blurred", gamma),
            k_tt,
            patient_kernel(shared, "blurred", "train", gamma),
        )
        excess = value - floor
        excess_se = jackknife_se(
            [
                without_each(k_ss) - 2 * cross_without_each(k_sr, 0),
                without_each(k_tt) - 2 * cross_without_each(k_tr, 0),
                -2 * cross_without_each(k_sr, 1) + 2 * cross_without_each(k_tr, 1),
            ]
        )
        return [
            self._estimate(
                "mmd2",
                value,
                normal_interval(value, se),
                n,
                floor,
                ceiling,
                sides,
                note,
                n_holdout,
            ),
            self._estimate(
                "mmd2_excess",
                excess,
                normal_interval(excess, excess_se),
                n,
                0.0,
                ceiling,
                sides,
                "",
                n_holdout,
            ),
        ]

    def _estimate(
        self,
        name: str,
        value: float | None,
        ci: tuple[float, float] | None,
        n: int,
        floor: float | None,
        ceiling: float | None,
        sides: Sides,
        note: str,
        n_holdout: int | None,
    ) -> Estimate:
        what = (
            "Unbiased RBF MMD^2 of descriptors, synthetic against held-out patients (floor: real "
            "train against the same)"
            if name == "mmd2"
            else "mmd2 of the synthetic cohort minus that of real train, on the same held-out "
            "patients"
        )
        return Estimate(
            name=name,
            group="fidelity",
            value=value,
            ci=ci,
            n=n,
            better="lower",
            floor=floor,
            ceiling=ceiling,
            method=f"{what}; ceiling: holdout blurred by 0.4 voxel; jackknife interval by patient.",
            seed=sides.seed,
            note=note,
            n_holdout=n_holdout,
        )


def median_gamma(shared: Shared) -> float:
    """1 / (2 m^2), m the median distance between scans of different patients of real train."""
    distance, groups = shared.distances("train", "train"), shared.patients("train")
    person = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    median = float(np.median(distance[person[:, None] < person[None, :]]))
    # a degenerate cohort of identical scans still gets a kernel
    return 1 / (2 * max(median, 1e-6) ** 2)


def patient_kernel(shared: Shared, a: Side, b: Side, gamma: float) -> Floats:
    """(patients of a, patients of b) mean kernel over the pairs of scans of two patients."""
    kernel = np.exp(-gamma * shared.distances(a, b) ** 2)
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
