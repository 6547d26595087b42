"""vendi: how many clearly different scans a cohort amounts to."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.equal import compare, one_variety
from synthmed.metrics.mmd import median_gamma
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate


class Vendi(Base):
    """Effective number of different scans; best near that of as many real ones.

    exp of the entropy of the eigenvalues of K / n, K the kernel of `mmd2` between the n scans: 1
    when all are alike, n when none resembles another. It grows with n, so that target and floor
    are real train at the same count (`equal`); a cohort with broken scans is more various than
    people are, and a figure above the target is no better than one below it. Ceiling: one scan
    over and over, 1.

    Args:
        draws: picks of equal counts that a figure is averaged over.

    Source: Friedman and Dieng 2023, arXiv:2210.02410, definition 3.1 (order 1).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["vendi"] = "vendi"
    draws: Annotated[int, Field(ge=1)] = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null when a side has fewer than two patients."""
        gamma = median_gamma(shared)

        def statistic(_a: Side, _a_scans: Ints, b: Side, scans: Ints) -> Floats:
            distances = shared.distances(b, b)[np.ix_(scans, scans)]
            return np.array([entropy(np.exp(-gamma * distances**2))])

        found = compare(shared, statistic, "vendi", self.draws, 2)
        what = "Effective number of different scans (order 1)"
        # draws and halves are those of the entropy, whose spread does not grow with n
        return [one_variety("vendi", what, "scans", found, 0.0, sides, shared, math.exp)]


def vendi(kernel: Floats) -> float:
    """The score of a kernel (n, n) with ones on its diagonal."""
    return math.exp(entropy(kernel))


def entropy(kernel: Floats) -> float:
    """The logarithm of `vendi`."""
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > 1e-15]
    return float(-np.sum(values * np.log(values)))
