"""mmd2: how far the synthetic cohort is from the held-out one, as distributions of descriptors."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from synthmed.metrics.base import Base
from synthmed.metrics.kernels import REASON, Discrepancy, discrepancy
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats
from synthmed.types import Estimate


class MMD(Base):
    """Unbiased squared maximum mean discrepancy with an RBF kernel; lower is better, 0 is equal.

    MMD2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j), with
    k(a, b) = exp(-gamma |a - b|^2) on z-scored descriptors and gamma = 1 / (2 m^2), m the median
    distance between scans of two different patients of real train.

    k of two patients is the mean over their pairs of scans (`kernels.by_patient`).

    - `mmd2`: synthetic against holdout, H. Floor: real train against H. Ceiling: H blurred by 0.4
      voxel against train.
    - `mmd2_excess`: MMD2(S, H) - MMD2(T, H), paired on one holdout. What is peculiar to H (its own
      term wholly) cancels, and since both parts are unbiased the difference is, whatever the
      three sizes. Floor 0; ceiling as above.

    Intervals leave out one patient at a time on every side (`stats.jackknife_se`); that of `mmd2`
    has an upper end of its own (`stats.distance_interval`).

    Source: Gretton et al. 2012, JMLR 13:723, equation 3.
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["mmd2"] = "mmd2"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """`mmd2` and `mmd2_excess`; null without three patients a side."""
        gamma = median_gamma(shared)

        def kernel(a: Side, b: Side) -> Floats:
            return np.asarray(np.exp(-gamma * shared.distances(a, b) ** 2))

        key = sides.key.fold("mmd2", "permutation")
        found = discrepancy(shared, kernel, sides.resamples, key)
        what = f"Unbiased RBF MMD^2 of {shared.numbers}"
        value = of_distance("mmd2", what, found, sides, shared)
        ceiling = None if found is None else found.ceiling
        excess = value.model_copy(
            update={
                "name": "mmd2_excess",
                "value": None if found is None else found.excess,
                "ci": None if found is None else found.excess_ci,
                "floor": None if ceiling is None else 0.0,
                "method": "mmd2 of the synthetic cohort minus that of real train, on the same "
                f"held-out patients; {_controls(shared)}",
                "note": REASON if found is None else "" if ceiling else "no held-out patients",
            }
        )
        return [value, excess]


def _controls(shared: Shared) -> str:
    return f"ceiling: {shared.control}; jackknife interval by patient."


def of_distance(
    name: str, what: str, found: Discrepancy | None, sides: Sides, shared: Shared
) -> Estimate:
    """The estimate of a distance by a kernel."""
    return Estimate(
        name=name,
        group="fidelity",
        value=None if found is None else found.value,
        ci=None if found is None else found.ci,
        n=len(shared.patients("synthetic")),
        better="lower",
        floor=None if found is None else found.floor,
        ceiling=None if found is None else found.ceiling,
        method=f"{what}, synthetic against held-out patients (floor: real train against the same); "
        f"{_controls(shared)}",
        seed=sides.seed,
        note=REASON if found is None else found.note,
        n_holdout=shared.n_holdout,
    )


def median_gamma(shared: Shared) -> float:
    """1 / (2 m^2), m the median distance between scans of different patients of real train."""
    distance, groups = shared.distances("train", "train"), shared.patients("train")
    person = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    median = np.median(distance[person[:, None] < person[None, :]]) if len(groups) > 1 else 0.0
    # a degenerate cohort of identical scans still gets a kernel
    return float(1 / (2 * max(float(median), 1e-6) ** 2))
