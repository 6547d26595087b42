"""spectrum_distance: is detail as strong, at every scale, as in real scans."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.descriptor import LENGTH, N_BINS
from synthmed.metrics.equal import compare, one_distance
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate


class SpectrumDistance(Base):
    """Distance of the mean log power spectra, in decibels; lower is better.

    sqrt(mean over bins of (S(f) - H(f))^2) with S and H the means over patients of
    10 log10 of the power in each of the descriptor's 21 radial bins (see `descriptor`); channels
    are pooled. Blur and added noise, which a distance of grey values cannot tell apart from
    anatomy, appear here. Synthetic against holdout at equal counts (`equal`).

    Args:
        draws: picks of equal counts that a figure is averaged over.

    Source: Durall et al. 2020 (radially averaged power spectra of generated images).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["spectrum_distance"] = "spectrum_distance"
    draws: Annotated[int, Field(ge=1)] = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null when a side has fewer than two patients."""
        columns = np.concatenate(
            [np.arange(N_BINS) + i * LENGTH for i in range(len(shared.images))]
        )

        def spectrum(side: Side, scans: Ints) -> Floats:
            powers = shared.descriptors(side)[scans][:, columns]
            return np.asarray(powers.mean(axis=0) * (10 / np.log(10)))

        def statistic(a: Side, a_scans: Ints, b: Side, b_scans: Ints) -> Floats:
            gap = spectrum(a, a_scans) - spectrum(b, b_scans)
            return np.array([np.sqrt(np.mean(gap**2))])

        found = compare(shared, statistic, "spectrum_distance", self.draws, 2)
        return [
            one_distance(
                "spectrum_distance",
                "Root mean square distance of mean log power spectra",
                "dB",
                found,
                sides,
                shared,
            )
        ]
