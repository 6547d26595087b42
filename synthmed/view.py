"""The field of view of scans that are smaller than the grid, kept apart from the anatomy in it.

Around such a scan the grid is exactly 0. The edge of that frame is no anatomy, yet the sharpest
thing in the volume, and lies elsewhere in every scan: a model would spend itself on it. So it is
trained on volumes whose frame is filled with the scan's own mirror image, and told how large the
view is; a sample is drawn for a size like the cohort's, and what lies outside becomes 0 again.

A view is (3,) whole numbers: voxels along X, Y and Z, centred on the grid as `prepare` centres a
scan. One that fills the grid is the grid itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from synthmed.types import Affine, Array

Size = tuple[int, int, int]
Sizes = npt.NDArray[np.int64]
Frame = tuple[slice, slice, slice]

_STEEP = 4.0
"""What a view of no voxels would be told as; real ones are within about one of 0."""
_BROKEN_OFF = 0.5
"""Share of a face that is not 0 where a scan breaks off; seen were 0.98 and more where it does, and
0.02 at most at the bounds of a brain without its skull."""
_DOUBT = 5.0
"""Scans' worth of doubt in what a condition shifts."""


def view_of(shape: Sequence[int], source: Affine, grid: Size, target: Affine) -> Size:
    """How many voxels of the grid a scan covers along each axis.

    A scan that is turned against the grid has no such box: it counts as filling the grid, and what
    is empty there stays a part of the image.

    Args:
        shape: voxels of the scan.
        source: its affine (4, 4).
        grid: (X, Y, Z), which both are centred on.
        target: affine (4, 4) of the grid.
    """
    step = np.linalg.solve(target[:3, :3], source[:3, :3])  # grid voxels a voxel of the scan
    if not np.allclose(step, np.diag(step.diagonal()), atol=1e-3) or (step.diagonal() <= 0).any():
        return grid
    if np.allclose(step.diagonal(), 1, atol=1e-4):  # copied, not interpolated
        x, y, z = (min(n, side) for n, side in zip(shape, grid, strict=True))
        return x, y, z
    sides = []
    for n, side, along in zip(shape, grid, step.diagonal(), strict=True):
        reach = (n - 1) / 2 * along + 1e-6  # of the outermost voxels' centres from the middle
        sides.append(int((np.abs(np.arange(side) - (side - 1) / 2) <= reach).sum()))
    x, y, z = sides
    return (x, y, z) if min(sides) > 0 else grid


def measured(values: npt.NDArray[Any]) -> Frame:
    """The part of a scan that was measured, where the rest is an empty frame added later.

    A frame is exactly 0, and what it surrounds breaks off at it: on every face that borders on it
    most voxels are not 0. Round an object in the dark, such as a brain without its skull, there is
    none, and all of the scan counts.
    """
    there = values != 0
    frame, edges = [], []
    for axis in range(3):
        along = there.any(axis=tuple(a for a in range(3) if a != axis))
        if not along.any():
            return slice(0, values.shape[0]), slice(0, values.shape[1]), slice(0, values.shape[2])
        first, last = int(along.argmax()), len(along) - int(along[::-1].argmax())
        frame.append(slice(first, last))
        edges += [(axis, 0)] * (first > 0) + [(axis, -1)] * (last < len(along))
    x, y, z = frame
    inside = there[x, y, z]
    if any(inside.take(end, axis).mean() < _BROKEN_OFF for axis, end in edges):
        return slice(0, values.shape[0]), slice(0, values.shape[1]), slice(0, values.shape[2])
    return x, y, z


def box(view: Sequence[int], grid: Size) -> Frame:
    """Where a view lies in the grid.

    >>> box((4, 5, 9), (7, 8, 9))
    (slice(2, 6, None), slice(2, 7, None), slice(0, 9, None))
    """
    starts = [round((side - n) / 2) for n, side in zip(view, grid, strict=True)]
    x, y, z = (slice(a, a + int(n)) for a, n in zip(starts, view, strict=True))
    return x, y, z


def fill(x: Tensor, view: Sequence[int]) -> Tensor:
    """A volume (C, X, Y, Z) whose frame is the mirror image of what is inside its view."""
    grid = x.shape[1:]
    for axis, (n, side) in enumerate(zip(view, grid, strict=True)):
        if n < side:
            x = x.index_select(axis + 1, _mirrored(int(n), side))
    return x


def cut(x: Tensor, views: Sequence[Sequence[int]]) -> Tensor:
    """Volumes (B, C, X, Y, Z), each 0 outside its view."""
    out = torch.zeros_like(x)
    nx, ny, nz = x.shape[2:]
    for i, view in enumerate(views):
        inside = (i, slice(None), *box(view, (nx, ny, nz)))
        out[inside] = x[inside]
    return out


@lru_cache(maxsize=256)
def _mirrored(n: int, side: int) -> Tensor:
    """(side,) which voxel each one shows: 1 0 | 0 1 2 ... n-1 | n-1 n-2, counted from the view."""
    start = round((side - n) / 2)
    folded = (torch.arange(side) - start) % (2 * n)
    return start + torch.where(folded < n, folded, 2 * n - 1 - folded)


@dataclass(frozen=True)
class Views:
    """The sizes of view of a cohort: Gaussian, with a mean that is linear in the condition.

    Args:
        grid: (X, Y, Z).
        mean: (3,) voxels.
        centre: (D,) condition at which the mean holds.
        weight: (D, 3) voxels by which a condition shifts it.
        factor: (3, 3) with the covariance as factor factor^T.
    """

    grid: Size
    mean: Array
    centre: Array
    weight: Array
    factor: Array

    WIDTH = 3
    """Numbers that a view is told as."""

    @classmethod
    def fit(
        cls,
        views: Sizes,
        conditions: Array,
        grid: Size,
        each: npt.NDArray[np.floating] | None = None,
    ) -> Views | None:
        """From (n, 3) views and (n, D) encoded conditions; None where all fill the grid.

        Args:
            views: of scans.
            conditions: of the same.
            grid: all of it.
            each: (n,) how much a scan counts, in people: those of a person add up to 1. Null where
                every scan is a person of its own.
        """
        if (views == grid).all():
            return None
        weights = np.ones(len(views)) if each is None else np.asarray(each, np.float64)
        mean, centre = (np.average(a, axis=0, weights=weights) for a in (views, conditions))
        root = np.sqrt(weights)[:, None]
        c, rest = root * (conditions - centre), root * (views - mean)
        weight = np.linalg.solve(c.T @ c + _DOUBT * np.eye(c.shape[1]), c.T @ rest)
        rest = rest - c @ weight
        values, vectors = np.linalg.eigh(rest.T @ rest / weights.sum())
        factor = vectors * np.sqrt(np.maximum(values, 0))
        return cls(grid, *(a.astype(np.float32) for a in (mean, centre, weight, factor)))

    def draw(self, generator: Generator, condition: Tensor) -> Size:
        """A view for an encoded condition (D,), all of it from the generator."""
        normal = torch.randn(3, generator=generator).numpy()
        shift = (condition.numpy() - self.centre) @ self.weight
        size = self.mean + shift + self.factor @ normal
        x, y, z = np.clip(np.rint(size), 1, self.grid).astype(int).tolist()
        return x, y, z

    def encode(self, views: Sizes | Sequence[Size]) -> Array:
        """(n, 3) float32 of views (n, 3); one that fills the grid is 0."""
        share = np.asarray(views, np.float32) / np.array(self.grid, np.float32) - 1
        return np.asarray(_STEEP * share, np.float32)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        arrays = ("mean", "centre", "weight", "factor")
        return {"grid": list(self.grid), **{k: getattr(self, k).tolist() for k in arrays}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Views:
        """What `as_json` gave."""
        x, y, z = values["grid"]
        width = len(values["centre"])
        shapes = {"mean": (3,), "centre": (width,), "weight": (width, 3), "factor": (3, 3)}
        arrays = {k: np.array(values[k], np.float32).reshape(s) for k, s in shapes.items()}
        return cls((x, y, z), **arrays)
