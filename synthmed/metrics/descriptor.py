"""The descriptor: 53 numbers of a volume in which distributions of scans are compared.

For one image channel x on a grid, in prepared intensity (about 0 to 1), in this order:

- 21 log powers: natural log of (1e-6 + mean squared coefficient) of the orthonormal DCT-II in 21
  bins of radial frequency, twenty equally wide over (0, 0.5] cycles a voxel and one for the
  corners beyond; the mean (frequency 0) is left out. Coefficient k of an axis of N voxels has
  frequency k / 2N. A cosine transform and not a Fourier one, because a crop whose faces differ
  would leak its edge over every frequency.
- 15 quantiles of intensity at `INTENSITY_LEVELS`.
- 8 natural logs of (1e-3 + quantile) of gradient magnitude at `GRADIENT_LEVELS`, from forward
  differences a voxel; central ones would not see noise or a checkerboard.
- 3 tissue counts: natural log of (1e-4 + share of voxels) above `TISSUE_LEVELS`.
- 6 extents: standard deviation of the position along X, Y and Z, as a share of the side, of the
  voxels above 0.15, then of those above 0.5; 0 where there are none.

Quantiles take the nearest order statistic. Several image channels are concatenated. Distances are
taken between z-scores: minus the mean, over the standard deviation of real train (a patient weighs
one) or the number's `RESOLUTION`, whichever is larger. Without that bound a number that preparing
a scan pins down (a background of exactly 0) would turn an invisible change into a huge distance.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from synthmed.metrics.blocks import Singles
from synthmed.metrics.stats import Floats, Ints

N_BINS = 21
INTENSITY_LEVELS = (
    *(0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    *(0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99),
)
GRADIENT_LEVELS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.98)
TISSUE_LEVELS = (0.15, 0.4, 0.7)
EXTENT_LEVELS = (0.15, 0.5)
POWER_FLOOR = 1e-6
"""Power of noise of 0.1 % of the intensity range: below it nobody sees a difference."""
LENGTH = N_BINS + len(INTENSITY_LEVELS) + len(GRADIENT_LEVELS) + 3 + 6
"""Numbers of one channel: 53."""
RESOLUTION = np.repeat([0.1, 0.01, 0.05, 0.05, 0.003], [21, 15, 8, 3, 6])
"""(53,) the smallest spread that each number is measured in: about the least visible change."""


def describe(block: Singles) -> Floats:
    """Descriptors (b, 53 C) of a block (b, C, X, Y, Z); see the module for the definition."""
    b, c = block.shape[:2]
    flat = block.reshape(b * c, *block.shape[2:])
    out = np.empty((b * c, LENGTH))
    # one volume at a time stays in the processor's cache, which a whole block does not
    for i, volume in enumerate(flat):
        out[i, :21] = log_powers(volume)
        out[i, 21:36] = _quantiles(volume, INTENSITY_LEVELS)
        out[i, 36:44] = np.log(1e-3 + _quantiles(_gradient(volume), GRADIENT_LEVELS))
        out[i, 44:] = _tissue(volume)
    return out.reshape(b, c * LENGTH)


def log_powers(volume: Singles) -> Floats:
    """The 21 log powers of one volume (X, Y, Z); an empty bin of a small grid is log(1e-6)."""
    from scipy.fft import dctn

    power = dctn(volume, norm="ortho").ravel().astype(np.float64) ** 2
    bins, counts = _radial_bins(volume.shape)
    total = np.bincount(bins, weights=power, minlength=N_BINS + 1)[1:]
    return np.asarray(np.log(POWER_FLOOR + total / np.maximum(counts, 1)))


@lru_cache(maxsize=4)
def _radial_bins(shape: tuple[int, ...]) -> tuple[Ints, Ints]:
    """(voxels,) bin 1 to 21 of every coefficient, 0 for the mean; and the coefficients a bin."""
    axes = np.meshgrid(*(np.arange(n) / (2 * n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes)).ravel()
    bins = np.clip(np.ceil(radius / 0.5 * (N_BINS - 1)), 0, N_BINS).astype(np.int64)
    return bins, np.bincount(bins, minlength=N_BINS + 1)[1:]


def _quantiles(values: Singles, levels: tuple[float, ...]) -> Floats:
    ordered = np.sort(values, axis=None)
    ranks = np.rint(np.array(levels) * (len(ordered) - 1)).astype(np.int64)
    return np.asarray(ordered[ranks], dtype=np.float64)


def _gradient(volume: Singles) -> Singles:
    """Magnitude of the forward differences (X - 1, Y - 1, Z - 1); along an axis of one voxel 0."""
    for axis, n in enumerate(volume.shape):
        if n == 1:
            volume = volume.repeat(2, axis)
    corner = volume[:-1, :-1, :-1]
    dx = volume[1:, :-1, :-1] - corner
    dy = volume[:-1, 1:, :-1] - corner
    dz = volume[:-1, :-1, 1:] - corner
    return np.asarray(np.sqrt(dx * dx + dy * dy + dz * dz))


def _tissue(volume: Singles) -> Floats:
    """3 log counts and 6 extents."""
    counts = [np.log(1e-4 + np.mean(volume > level)) for level in TISSUE_LEVELS]
    extents = [_extents(volume > level) for level in EXTENT_LEVELS]
    return np.concatenate([counts, *extents])


def _extents(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Floats:
    """Standard deviation of the mask's voxels along each axis, as a share of the side."""
    total = int(mask.sum())
    if total == 0:
        return np.zeros(3)
    planes = mask.sum(axis=2)  # (X, Y)
    profiles = (planes.sum(axis=1), planes.sum(axis=0), mask.sum(axis=(0, 1)))
    out = np.empty(3)
    for axis, profile in enumerate(profiles):
        position = (np.arange(len(profile)) + 0.5) / len(profile)
        mean = float(profile @ position) / total
        out[axis] = np.sqrt(float(profile @ (position - mean) ** 2) / total)
    return out
