"""precision, recall, density, coverage: do samples fall among patients, and patients among them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.equal import compare
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import (
    Floats,
    Ints,
    clopper_pearson,
    half_se,
    normal_interval,
    share_interval,
)
from synthmed.types import Estimate

FIGURES = ("precision", "recall", "density", "coverage")


class PRDC(Base):
    """Overlap of two samples by balls to the k-th nearest neighbour; higher is better.

    With B(p) the open ball round p that reaches its k-th neighbour in its own set:

    - `precision`: share of synthetic scans inside the ball of some real one.
    - `recall`: share of real scans inside the ball of some synthetic one.
    - `density`: 1/k of the mean number of real balls that a synthetic scan lies in (may pass 1).
    - `coverage`: share of real balls with a synthetic scan inside.

    Synthetic against holdout in z-scored descriptors, one scan a patient, equal counts (`equal`).
    Floor: real train in the place of synthetic; it is well below 1. Ceiling: the blurred holdout
    against train. Interval: 1.96 standard errors, from halves of the patients, of a share on the
    scale of `stats.share_interval`; where all halves say 0, or all say 1, the bound of Clopper and
    Pearson for none, or all, of as many.

    Args:
        k: neighbours that define a ball.
        draws: picks of equal counts that a figure is averaged over.

    Source: Kynkaanniemi et al. 2019, equation 2; Naeem et al. 2020, equations 3 and 4.
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["prdc"] = "prdc"
    k: Annotated[int, Field(ge=1)] = 5
    draws: Annotated[int, Field(ge=1)] = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """The four estimates; null when a side has fewer than k + 2 patients."""

        def statistic(a: Side, a_scans: Ints, b: Side, b_scans: Ints) -> Floats:
            return prdc(
                shared.distances(a, a)[np.ix_(a_scans, a_scans)],
                shared.distances(b, b)[np.ix_(b_scans, b_scans)],
                shared.distances(a, b)[np.ix_(a_scans, b_scans)],
                self.k,
            )

        found = compare(shared, statistic, "prdc", self.draws, self.k + 2)
        out = []
        for i, name in enumerate(FIGURES):
            value = ci = floor = ceiling = None
            method, note = "Overlap of k-NN balls.", f"a side has fewer than {self.k + 2} patients"
            if found is not None:
                value = float(found.value[i])
                # of so many scans each may lie in every ball
                top = found.count / self.k if name == "density" else 1.0
                if found.halves is not None:
                    # halves that all say none, or all, have no spread: the exact bound is left
                    gap = top * clopper_pearson(0, found.count)[1]
                    halves = found.halves[:, i]
                    if name == "density":
                        ci = normal_interval(value, half_se(halves), 0.0, top, gap)
                    else:
                        ci = share_interval(value, halves, gap)
                if found.floor is not None and found.ceiling is not None:
                    floor, ceiling = float(found.floor[i]), float(found.ceiling[i])
                method = (
                    f"k-NN balls (k = {self.k}) of descriptors, synthetic against {found.against} "
                    f"patients, {shared.counted(found.count)} a side; floor: real train against "
                    "the same; ceiling: holdout blurred by 0.4 voxel; interval from halves of the "
                    "patients."
                )
                note = found.limits
            out.append(
                Estimate(
                    name=name,
                    group="fidelity",
                    value=value,
                    ci=ci,
                    n=len(shared.patients("synthetic")),
                    better="higher",
                    floor=floor,
                    ceiling=ceiling,
                    method=method,
                    seed=sides.seed,
                    note=note,
                    n_holdout=shared.n_holdout,
                )
            )
        return out


def prdc(d_rr: Floats, d_ss: Floats, d_rs: Floats, k: int) -> Floats:
    """(4,) precision, recall, density, coverage from distances real-real, made-made, real-made."""
    # column k of the sorted row: column 0 is the scan itself
    r_real = np.partition(d_rr, k, axis=1)[:, k]
    r_made = np.partition(d_ss, k, axis=1)[:, k]
    in_real = d_rs < r_real[:, None]
    return np.array(
        [
            in_real.any(axis=0).mean(),
            (d_rs < r_made[None, :]).any(axis=1).mean(),
            in_real.sum(axis=0).mean() / k,
            in_real.any(axis=1).mean(),
        ]
    )
