"""Principal components of a cohort's images: a space that no real scan had a say in.

An attack that asks training and held-out patients alike must look at both with the same eyes. Axes
learned on one of the real sides would fit its own patients better, so they are learned on the
cohort that is attacked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from synthmed.metrics.stats import Floats

SIDE = 12
"""Voxels a side of the small images that have components."""
MOST = 10
"""Components at most: densities and neighbours mean little among more, with some hundred people."""
SCANS_PER_COMPONENT = 10
LEAST_SPREAD = 1e-6
"""Singular value, in prepared intensity, below which a cohort shows one scan over and over."""


@dataclass(frozen=True)
class Axes:
    """Where a scan lies along the components, in standard deviations of the cohort.

    Args:
        mean: (voxels,) of the cohort.
        directions: (voxels, k), each divided by the cohort's standard deviation along it.
    """

    mean: Floats
    directions: Floats

    def of(self, scans: Floats) -> Floats:
        """(n, k) places of (n, voxels)."""
        return np.asarray((scans - self.mean) @ self.directions)


def axes(cohort: Floats) -> Axes | None:
    """The leading components of (n, voxels): one for ten scans, at least 1 and at most `MOST`.

    Null where the scans are all alike, or there is one alone, or none of its voxels.

    Source: Pearson 1901.
    """
    n = len(cohort)
    if n < 2 or cohort.shape[1] == 0:
        return None
    mean = cohort.mean(axis=0)
    _, spread, directions = np.linalg.svd(cohort - mean, full_matrices=False)
    wanted = max(1, min(MOST, n // SCANS_PER_COMPONENT))
    kept = min(wanted, int(np.sum(spread > max(LEAST_SPREAD, 1e-6 * spread[0]))))
    if kept == 0:
        return None
    sd = spread[:kept] / np.sqrt(n - 1)
    return Axes(mean, directions[:kept].T / sd)
