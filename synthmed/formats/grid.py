"""Volumes moved onto another grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.processing import resample_from_to
from scipy.ndimage import gaussian_filter

from synthmed.types import Affine


def corners_apart(shape: Sequence[int], a: Affine, b: Affine) -> float:
    """How many mm the corners of two grids of one shape are apart, at most."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    step = a - b
    return float(np.linalg.norm(corners @ step[:3, :3].T + step[:3, 3], axis=1).max())


def resample(
    values: npt.NDArray[np.float32],
    source: Affine,
    shape: Sequence[int],
    target: Affine,
    order: int,
) -> npt.NDArray[np.float32]:
    """`values` at the voxels of a grid, 0 outside their field of view.

    Args:
        values: (I, J, K).
        source: (4, 4) of `values`, voxel index to mm.
        shape: (X, Y, Z) of the grid.
        target: (4, 4) of the grid.
        order: of the interpolation; 0 takes the nearest voxel.
    """
    ratio = np.linalg.norm(target[:3, :3], axis=0) / np.linalg.norm(source[:3, :3], axis=0)
    if (ratio > 1.01).any() and order > 0:
        # a coarser grid would alias: blur to its resolution first (Cardoso et al. 2015)
        values = gaussian_filter(values, np.sqrt(np.maximum(ratio**2 - 1, 0)) / 2.355)
    image = nib.nifti1.Nifti1Image(values, source)  # type: ignore[no-untyped-call]
    moved = resample_from_to(  # type: ignore[no-untyped-call]
        image, (tuple(shape), target), order=order, cval=0.0
    )
    return np.asarray(moved.dataobj, np.float32)
