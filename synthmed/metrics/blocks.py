"""Reading scans in blocks, so that memory stays bounded however large a cohort is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from synthmed.artifacts import ChannelInfo
from synthmed.metrics.sides import Cases
from synthmed.metrics.stats import Floats, Ints

Singles = npt.NDArray[np.float32]

BLOCK_VALUES = 4_000_000
"""Values of a block: 16 MB as float32, so that a step with a few temporaries stays below 100."""

LARGEST = float(np.finfo(np.float16).max)
"""Of the values that float16 can hold."""


def image_channels(channels: Sequence[ChannelInfo]) -> tuple[int, ...]:
    """Which channels are images; masks are never compared as intensities."""
    return tuple(i for i, c in enumerate(channels) if c.mask is None)


def blocks(
    cases: Cases, channels: Sequence[int], scans: Ints | None = None, blur_voxels: float = 0.0
) -> Iterator[Singles]:
    """The chosen scans and channels in order, as float32 blocks (b, C, X, Y, Z).

    Args:
        cases: one side.
        channels: which channels to read.
        scans: which scans; all by default.
        blur_voxels: standard deviation of a Gaussian blur, the known-bad control; 0 is none.
    """
    import torch  # its conversions of float16 are many times as fast

    chosen = np.arange(len(cases)) if scans is None else scans
    each = len(channels) * int(np.prod(cases.volumes.shape[2:]))
    step = max(1, BLOCK_VALUES // max(1, each))
    for start in range(0, len(chosen), step):
        rows = chosen[start : start + step]
        block = torch.from_numpy(np.asarray(cases.volumes[rows])[:, list(channels)]).float()
        # a generator that diverged must be judged, not crash the judge
        block.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if blur_voxels > 0:
            from scipy.ndimage import gaussian_filter

            sigma = (0, 0, blur_voxels, blur_voxels, blur_voxels)
            block = torch.from_numpy(gaussian_filter(block.numpy(), sigma))
        # prepared scans are stored as float16: every side is rounded alike, or the rounding
        # itself would tell real from synthetic in the highest frequencies
        yield block.clamp_(-LARGEST, LARGEST).half().float().numpy()


def block_means(
    block: Singles, size: Sequence[int], ahead: Sequence[float] = (0.0, 0.0, 0.0)
) -> Singles:
    """Area averages of (b, C, X, Y, Z) on a grid of `size` voxels, never finer than the input.

    Each output voxel is the mean over its share of the input's extent, partial voxels weighted.

    Args:
        block: what is averaged.
        size: of the grid.
        ahead: how far the grid lies along X, Y and Z of the place where it covers the input, in
            its own voxels, at least 0 and below 1; the last voxel averages what is left to it.
    """
    out = block
    for axis, (wanted, by) in enumerate(zip(size, ahead, strict=True), start=2):
        n = out.shape[axis]
        if wanted < n or by:
            means = _averaging(n, min(wanted, n), by).astype(np.float32)
            shape = (*out.shape[:axis], len(means), *out.shape[axis + 1 :])
            # the axes behind as one: a product of matrices as they lie in memory
            out = (means @ out.reshape(*out.shape[: axis + 1], -1)).reshape(shape)
    return np.ascontiguousarray(out, dtype=np.float32)


def smallest(block: Singles, grid: Sequence[int]) -> Floats:
    """(b, C voxels) area averages of (b, C, X, Y, Z) on a grid, as rows."""
    return np.asarray(block_means(block, grid).reshape(len(block), -1), dtype=np.float64)


def _averaging(n: int, wanted: int, ahead: float = 0.0) -> Floats:
    """(wanted, n) matrix whose rows average n voxels over `wanted` equal stretches."""
    edges = np.linspace(0, n, wanted + 1) + ahead * n / wanted
    left = np.maximum(edges[:-1, None], np.arange(n)[None, :])
    right = np.minimum(edges[1:, None], np.arange(1, n + 1)[None, :])
    shares = np.clip(right - left, 0, None)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
