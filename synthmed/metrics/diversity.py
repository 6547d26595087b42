"""ms_ssim_diversity: how much two scans differ, voxel by voxel, at several scales."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.blocks import Singles, blocks
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats
from synthmed.types import Estimate

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of five scales; a grid that holds fewer takes the first, scaled to the same sum of 1."""
WINDOW, SIGMA = 11, 1.5
"""Voxels a side of the Gaussian window, and its standard deviation."""
K1, K2 = 0.01, 0.03


class MSSSIMDiversity(Base):
    """1 - MS-SSIM between two scans of different patients, on average; best near that of patients.

    MS-SSIM = SSIM at the coarsest scale ^ w_M * product of the contrast and structure term ^ w_j at
    the finer ones, on prepared intensities clipped to 0 to 1, in a Gaussian window of 11 voxels
    (smaller where the grid is); each further scale halves the grid, as long as a window fits.
    Patients are put into pairs, each patient in one, so that pairs are independent and the mean
    does not depend on how many there are; its interval is that of t. Of patients with several scans
    up to `draws` pairs of these stand for the pair of patients. 0 is one scan over and over
    (the ceiling); noise is more various than people are, so that more than the floor, the diversity
    of real train, is no better.

    Args:
        pairs: of patients, at most.
        draws: pairs of scans of two patients, at most; their mean counts.

    Source: Wang, Simoncelli and Bovik 2003; Odena et al. 2017 (as diversity of generated images).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["ms_ssim_diversity"] = "ms_ssim_diversity"
    pairs: Annotated[int, Field(ge=2)] = 50
    draws: Annotated[int, Field(ge=1)] = 4

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null with fewer than four patients a side."""
        value = ci = floor = None
        note = "a side has fewer than four patients"
        made, real = (self._differences(shared, side) for side in ("synthetic", "train"))
        if min(len(made), len(real)) >= 2:
            value, floor = float(made.mean()), float(real.mean())
            ci, (low, high) = mean_interval(made), mean_interval(real)
            note = f"training patients: {low:.3g} to {high:.3g}"
        return [
            Estimate(
                name="ms_ssim_diversity",
                group="fidelity",
                value=value,
                ci=ci,
                n=len(shared.patients("synthetic")),
                better="match",
                target=floor,
                floor=floor,
                ceiling=0.0,
                method=f"1 - MS-SSIM of {len(made)} pairs of synthetic scans; floor and target: "
                f"{shared.counted(len(real))} pairs of training patients; ceiling: one scan over "
                "and over.",
                seed=sides.seed,
                note=note,
                n_holdout=None,
            )
        ]

    def _differences(self, shared: Shared, side: Side) -> Floats:
        """(pairs,) 1 - MS-SSIM between patients of a side."""
        groups = shared.patients(side)
        n = min(self.pairs, len(groups) // 2)
        rng = shared.sides.key.fold("ms_ssim_diversity", side).numpy()
        chosen = rng.permutation(len(groups))[: 2 * n]
        out = []
        for i, j in zip(chosen[:n], chosen[n:], strict=True):
            both = list(itertools.product(groups[i], groups[j]))
            drawn = rng.permutation(len(both))[: self.draws]
            out.append(np.mean([self._difference(shared, side, both[k]) for k in drawn]))
        return np.array(out, dtype=np.float64)

    @staticmethod
    def _difference(shared: Shared, side: Side, scans: tuple[int, int]) -> float:
        """1 - MS-SSIM of two scans, a mean over image channels."""
        rows = shared.scans(side)[list(scans)]
        # two scans of a fine grid are in a block each
        pair = np.concatenate(list(blocks(shared.cases(side), shared.images, rows)))
        return float(np.mean([1 - ms_ssim(x, y) for x, y in zip(*pair, strict=True)]))


def mean_interval(x: Floats) -> tuple[float, float]:
    """95 % interval of the mean of n pairs, clipped to 0 to 1: t of n - 1 degrees of freedom.

    Pairs may be as few as two, of which 1.96 standard errors would hold the mean seven times in
    ten.

    Source: Student 1908.
    """
    from scipy.stats import t

    n = len(x)
    reach = float(t.ppf(0.975, n - 1)) * float(x.std(ddof=1)) / np.sqrt(n)
    return max(0.0, float(x.mean() - reach)), min(1.0, float(x.mean() + reach))


def ms_ssim(x: Singles, y: Singles) -> float:
    """MS-SSIM of two volumes (X, Y, Z) or slices (an axis of one voxel is none), 0 to 1."""
    a, b = (np.clip(v, 0, 1).astype(np.float32).squeeze() for v in (x, y))
    side = min(a.shape)
    window = min(WINDOW, side - 1 + side % 2)  # odd
    levels = 1
    while levels < len(WEIGHTS) and side // 2**levels >= window:
        levels += 1
    product = 1.0
    for level in range(levels):
        structure, luminance = _terms(a, b, window)
        last = level == levels - 1
        term = float(np.mean(structure * luminance if last else structure))
        product *= max(term, 0.0) ** (WEIGHTS[level] / sum(WEIGHTS[:levels]))
        if not last:
            a, b = _halved(a), _halved(b)
    return product


def _terms(a: Singles, b: Singles, window: int) -> tuple[Singles, Singles]:
    """Contrast and structure, and luminance, wherever the whole window is inside."""
    from scipy.ndimage import correlate1d

    at = np.arange(window) - window // 2
    weights = np.exp(-(at**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def smooth(v: Singles) -> Singles:
        for axis in range(v.ndim):
            v = correlate1d(v, weights, axis, mode="constant")
        edge = window // 2
        inside = tuple(slice(edge, n - edge) for n in v.shape)
        return v[inside]

    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    together = smooth(a * b) - mean_a * mean_b
    structure = (2 * together + K2**2) / (spread + K2**2)
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    return structure, luminance


def _halved(v: Singles) -> Singles:
    """Means of 2 voxels along every axis; an odd voxel at an end is left out."""
    sides = [n // 2 for n in v.shape]
    whole = v[tuple(slice(2 * n) for n in sides)].reshape([k for n in sides for k in (n, 2)])
    return np.asarray(whole.mean(axis=tuple(range(1, 2 * v.ndim, 2))), dtype=np.float32)
