"""intensity_w1: how far the grey values of the synthetic cohort lie from those of patients."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.blocks import Singles
from synthmed.metrics.equal import compare, one_distance
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate

LOW, HIGH = -0.5, 2.0
"""Prepared intensities beyond these count at the edge; the robust range of a scan is 0 to 1."""


class IntensityW1(Base):
    """Wasserstein-1 distance of pooled voxel intensities; lower is better, in shares of the range.

    W1 = integral |F(x) - G(x)| dx of the two cumulative distributions, every patient with the same
    weight, on `bins` equal bins of prepared intensity from -0.5 to 2 (exact for the binned values,
    so within one bin width of the distance of the raw ones). Channels are averaged. Synthetic
    against holdout at equal counts (`equal`); a distance of finite samples is above 0 even for
    equal distributions, which is what the floor shows.

    Args:
        bins: bins of intensity.
        draws: picks of equal counts that a figure is averaged over.

    Source: Villani 2003, theorem 2.18 (W1 on the line is the area between two CDFs).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["intensity_w1"] = "intensity_w1"
    bins: Annotated[int, Field(ge=50, le=10_000)] = 1000
    draws: Annotated[int, Field(ge=1)] = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null when a side has fewer than two patients."""

        used: tuple[Side, ...] = ("synthetic", "train", "holdout", "blurred")
        width = len(shared.images) * self.bins
        cumulative = {
            side: shared.per_scan(side, f"cdfs {self.bins}", width, lambda b: cdfs(b, self.bins))
            for side in used
        }

        def statistic(a: Side, a_scans: Ints, b: Side, b_scans: Ints) -> Floats:
            gap = cumulative[a][a_scans].mean(axis=0) - cumulative[b][b_scans].mean(axis=0)
            return np.array([np.abs(gap).mean() * (HIGH - LOW)])

        found = compare(shared, statistic, "intensity_w1", self.draws, 2)
        return [
            one_distance(
                "intensity_w1",
                "Wasserstein-1 distance of pooled voxel intensities",
                "share of the intensity range",
                found,
                sides,
                shared,
            )
        ]


def cdfs(block: Singles, bins: int) -> Floats:
    """(b, C * bins) share of a scan's voxels up to the end of each bin."""
    b, c = block.shape[:2]
    width = (HIGH - LOW) / bins
    index = np.clip((block.reshape(b * c, -1) - LOW) / width, 0, bins - 1).astype(np.int64)
    counts = np.stack([np.bincount(row, minlength=bins) for row in index])
    return np.asarray(np.cumsum(counts, axis=1) / index.shape[1]).reshape(b, c * bins)
