"""Orthonormal 3D Haar transform with every band on one coarse grid.

Haar 1910; Mallat 1989 for the pyramid. Level 1 splits a volume into eight bands of half its side,
level 2 splits the low band again. So that a network sees one tensor, the details of the finer
levels are folded (each 2 x 2 x 2 neighbourhood into eight channels, which only moves voxels) down
to the coarsest grid. Every step is orthonormal: norms, distances and white noise stay as they are,
so the diffusion of the bands is the diffusion of the voxels.

Axes: ... any leading axes, C channels, X Y Z voxels, x y z the coarse grid X/2^levels and so on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, cat, stack, unflatten

from synthmed.errors import UsageError

_SCALE = 1 / math.sqrt(8)  # three axes, 1/sqrt(2) each, in one product


class Band(NamedTuple):
    """What one channel of the transform holds.

    Args:
        channel: of the volume.
        level: 1 for the finest details, `levels` for the coarsest ones and the low band.
        high: whether the band is a difference along x, y, z; none of them is the low band.
        offset: its place in the neighbourhood of side 2^(levels - level) that was folded.
    """

    channel: int
    level: int
    high: tuple[bool, bool, bool]
    offset: tuple[int, int, int]

    @property
    def low(self) -> bool:
        """True for the local means."""
        return not any(self.high)


@dataclass(frozen=True)
class Haar:
    """The transform of `levels` levels; 0 leaves volumes as they are.

    A volume that is v everywhere has v * 2^(1.5 levels) in its low band and 0 elsewhere.

    Args:
        levels: 0 to 4.
    """

    levels: int

    def __post_init__(self) -> None:
        if not 0 <= self.levels <= 4:
            raise UsageError(f"wavelet levels are {self.levels}", "Choose 0 to 4.")

    def padded(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The smallest grid that holds `grid` and can be transformed."""
        side = 2**self.levels
        x, y, z = (-(-n // side) * side for n in grid)
        return x, y, z

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (..., C, X, Y, Z) as bands (..., C * 8^levels, x, y, z).

        Channels are in the order of `bands`. Differentiable, usable under vmap.

        Raises:
            UsageError: a side does not divide by 2^levels.
        """
        sides = tuple(x.shape[-3:])
        if any(n % 2**self.levels for n in sides):
            raise UsageError(
                f"a grid of {sides} does not divide by {2**self.levels}",
                "Pad it to Haar.padded first.",
            )
        return _forward(x, self.levels)

    def inverse(self, y: Tensor) -> Tensor:
        """Volumes (..., C, X, Y, Z) from bands (..., C * 8^levels, x, y, z).

        Raises:
            UsageError: the number of channels does not divide by 8^levels.
        """
        if y.shape[-4] % 8**self.levels:
            raise UsageError(
                f"{y.shape[-4]} channels do not divide by {8**self.levels}",
                f"Give bands of {self.levels} levels.",
            )
        return _inverse(y, self.levels)

    def bands(self, channels: int) -> tuple[Band, ...]:
        """What each channel of the transform of a volume with `channels` channels holds."""
        both = (False, True)
        highs = list(product(both, both, both))
        out = []
        for channel in range(channels):
            for level in range(self.levels, 0, -1):
                side = range(2 ** (self.levels - level))
                places = list(product(side, side, side))
                for high in highs[0 if level == self.levels else 1 :]:
                    out += [Band(channel, level, high, place) for place in places]
            if not self.levels:
                out.append(Band(channel, 0, highs[0], (0, 0, 0)))
        return tuple(out)


def pad_to(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, C, X, Y, Z) grown to `grid` by repeating the last slice of each axis.

    Raises:
        UsageError: the volume is larger than `grid`.
    """
    more = [n - m for n, m in zip(grid, x.shape[-3:], strict=True)]
    if min(more) < 0:
        raise UsageError(f"a volume of {tuple(x.shape[-3:])} does not fit into {grid}")
    if not any(more):
        return x
    return F.pad(x, (0, more[2], 0, more[1], 0, more[0]), mode="replicate")


def crop_to(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(..., X, Y, Z) cut to its first `grid` voxels: the inverse of `pad_to`, bit for bit."""
    return x[..., : grid[0], : grid[1], : grid[2]]


def _forward(x: Tensor, levels: int) -> Tensor:
    if not levels:
        return x
    split = _butterflies(_fold(x, 1)) * _SCALE  # (..., C, 8, X/2, Y/2, Z/2), low band first
    low = _forward(split[..., 0, :, :, :], levels - 1)
    low = unflatten(low, -4, (-1, 8 ** (levels - 1)))
    detail = _fold(split[..., 1:, :, :, :], levels - 1).flatten(-5, -4)
    return cat((low, detail), -4).flatten(-5, -4)


def _inverse(y: Tensor, levels: int) -> Tensor:
    if not levels:
        return y
    n = 8 ** (levels - 1)
    y = unflatten(y, -4, (-1, 8 * n))
    low = _inverse(y[..., :n, :, :, :].flatten(-5, -4), levels - 1)
    detail = _unfold(unflatten(y[..., n:, :, :, :], -4, (7, n)))
    return _unfold(_butterflies(cat((low.unsqueeze(-4), detail), -4)) * _SCALE)


def _butterflies(x: Tensor) -> Tensor:
    """Sums and differences along each bit of the axis of eight in (..., 8, x, y, z)."""
    x = unflatten(x, -4, (2, 2, 2))
    for axis in (-6, -5, -4):
        a, b = x.unbind(axis)
        x = stack((a + b, a - b), axis)
    return x.flatten(-6, -4)


def _fold(x: Tensor, times: int) -> Tensor:
    """(..., X, Y, Z) to (..., 8^times, x, y, z): cubes of side 2^times into an axis, x slowest."""
    s = 2**times
    x = unflatten(unflatten(unflatten(x, -1, (-1, s)), -3, (-1, s)), -5, (-1, s))
    # ..., x, i, y, j, z, k  ->  ..., i, j, k, x, y, z
    x = x.movedim((-5, -3, -1), (-6, -5, -4))
    return x.flatten(-6, -4)


def _unfold(x: Tensor) -> Tensor:
    """The inverse of `_fold`: (..., 8^times, x, y, z) to (..., X, Y, Z)."""
    s = round(x.shape[-4] ** (1 / 3))
    x = unflatten(x, -4, (s, s, s)).movedim((-6, -5, -4), (-5, -3, -1))
    return x.flatten(-2, -1).flatten(-3, -2).flatten(-4, -3)
