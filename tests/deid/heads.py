"""A head of ellipsoids: skin, skull, liquid, brain with folds and ventricles, nose, eyes, neck."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

SPACING = 3.0
SHAPE = (64, 76, 80)
MIDDLE = np.array([96.0, 110.0, 150.0])
"""Of the brain, in mm from the corner of the volume."""


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Radius of every voxel in units of an ellipsoid's; `centre` is in mm from the brain's."""
    axes = np.indices(SHAPE).astype(float) * SPACING
    from_centre = axes - (MIDDLE + np.array(centre))[:, None, None, None]
    return np.sqrt(((from_centre / np.array(radii)[:, None, None, None]) ** 2).sum(0))


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A T1-weighted head (int16, RAS+ in voxels of 3 mm), its brain, and its face (nose, eyes)."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.97, 1.03, 3)
    radii = tuple(np.array([68.0, 85, 62]) * size)
    ball = ellipsoid((0, 0, 0), radii)
    fold = gaussian_filter(rng.normal(size=SHAPE), 1.3)
    fold /= fold.std()
    brain = ball < 1
    image = np.zeros(SHAPE)
    outer = ellipsoid((0, 0, 0), tuple(r + 15 for r in radii))
    neck = (ellipsoid((0, -30, -120), (55, 58, 400)) < 1) & (np.indices(SHAPE)[2] < 40)
    jaw = ellipsoid((0, 40, -80), (52, 62, 75)) < 1
    image[neck | jaw] = 330 + 60 * fold[neck | jaw]
    image[outer < 1] = 620  # skin and fat
    image[ellipsoid((0, 0, 0), tuple(r + 10 for r in radii)) < 1] = 60  # bone
    image[ellipsoid((0, 0, 0), tuple(r + 3 for r in radii)) < 1] = 120  # liquid
    nose = ellipsoid((0, 108, -62), (14, 22, 24)) < 1
    eyes = np.minimum(ellipsoid((33, 80, -45), (13,) * 3), ellipsoid((-33, 80, -45), (13,) * 3)) < 1
    image[nose] = 420
    image[eyes & (ball >= 1.05)] = 150
    cortex = np.clip((1 - ball) * 62, 0, 40)  # mm under the surface
    white = brain & (cortex + 3 * fold > 8)
    image[brain] = 380
    image[white] = 560
    ventricle = ellipsoid((9, 0, 5), (5, 30, 9)), ellipsoid((-9, 0, 5), (5, 30, 9))
    image[np.minimum(*ventricle) < 1] = 130
    image = gaussian_filter(image, 0.5) + rng.normal(0, 12, SHAPE)
    return np.abs(image).astype(np.int16), brain, nose | eyes


def affine() -> np.ndarray:
    """Voxel to mm."""
    return np.diag([SPACING, SPACING, SPACING, 1.0])
