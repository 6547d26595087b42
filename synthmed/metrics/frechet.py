"""frechet: difference of mean and spread in the descriptor, known to grow in small cohorts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.equal import compare, one_distance
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate

PATIENTS_A_COMPONENT = 5
"""Patients that stand behind each principal component at least."""


class Frechet(Base):
    """Squared Frechet distance of two Gaussians; lower is better.

    |mean_s - mean_h|^2 + tr(C_s + C_h - 2 (C_s C_h)^(1/2)) in the first d principal components of
    the z-scored descriptors of real train, d at most a tenth of the patients compared (halves of
    them stand behind the interval, in the same components). The last trace is the nuclear norm of
    X_s X_h^T, X the centred samples over sqrt(n - 1): exact also for n < d. The distance of finite
    samples is above 0 even for equal distributions, and more so the fewer they are; synthetic is
    compared with the holdout at equal counts (`equal`), and the floor shows that bias. Nothing is
    subtracted.

    Args:
        components: d at most.
        draws: picks of equal counts that a figure is averaged over.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (there on the features of a network).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["frechet"] = "frechet"
    components: Annotated[int, Field(ge=1)] = 32
    draws: Annotated[int, Field(ge=1)] = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null when a side has fewer than ten patients."""
        used: tuple[Side, ...] = ("train", shared.reference, "synthetic")
        count = min(len(shared.patients(side)) for side in used)
        # half of the patients stand behind the interval, in the same components
        d = max(1, min(self.components, count // (2 * PATIENTS_A_COMPONENT)))
        axes = principal_axes(shared.features("train"), d)

        def statistic(a: Side, a_scans: Ints, b: Side, b_scans: Ints) -> Floats:
            x, y = shared.features(a)[a_scans] @ axes, shared.features(b)[b_scans] @ axes
            return np.array([frechet(x, y)])

        found = compare(shared, statistic, "frechet", self.draws, 2 * PATIENTS_A_COMPONENT)
        where = f"{axes.shape[1]} principal components of {shared.numbers}"
        what = f"Squared Frechet distance in {where}"
        return [one_distance("frechet", what, "1", found, sides, shared, 2 * PATIENTS_A_COMPONENT)]


def principal_axes(features: Floats, d: int) -> Floats:
    """(D, at most d) directions of greatest variance of (n, D) features."""
    if len(features) == 0:
        return np.eye(features.shape[1], d)
    _, _, axes = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    return np.asarray(axes[:d].T)


def frechet(x: Floats, y: Floats) -> float:
    """The squared distance of the Gaussians with the moments of (n, d) and (m, d) samples."""
    gap = x.mean(axis=0) - y.mean(axis=0)
    a = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    # orthogonal factors leave the norm as it is, and the others are at most d by d
    small_a, small_b = (np.asarray(np.linalg.qr(v, mode="r")) for v in (a, b))
    shared = np.linalg.svd(small_a @ small_b.T, compute_uv=False).sum()
    return float(max(0.0, gap @ gap + np.sum(a**2) + np.sum(b**2) - 2 * shared))
