"""Random changes of training scans, each keyed by (step, patient): see `config.Augment`.

With `conditioned`, what was done to a scan is told to the model beside its labels, and a sample is
asked for with nothing done to it, so that the changes do not leak into the samples (Karras et al.
2022, arXiv:2206.00364, appendix F.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from synthmed.config import Augment


@dataclass(frozen=True)
class Change:
    """What is done to one scan. Axes are X, Y, Z.

    Args:
        flip: left and right are mirrored.
        angles: (3,) float64, radians about the grid's axes, in millimetres.
        scale: factor on the map from output to input; above 1 the anatomy shrinks.
        shift_voxels: (3,) float64.
        gain: factor on the brightness.
        power: exponent of the brightness.
    """

    flip: bool
    angles: Tensor
    scale: float
    shift_voxels: Tensor
    gain: float
    power: float


def draw_change(augment: Augment, g: Generator) -> Change:
    """One scan's change, from its own generator; nothing asked is nothing changed."""

    def uniform(n: int) -> Tensor:
        return 2 * torch.rand(n, generator=g, dtype=torch.float64) - 1

    angles = uniform(3) * math.radians(augment.rotate_degrees)
    scale = uniform(1) * augment.scale
    shift = uniform(3) * augment.shift_voxels
    flip = augment.flip and uniform(1).item() < 0
    brightness = uniform(2) * augment.intensity
    moved, brightened = torch.rand(2, generator=g, dtype=torch.float64) < augment.probability
    gain, power = (1 + brightness * brightened).tolist()
    return Change(flip, angles * moved, 1 + (scale * moved).item(), shift * moved, gain, power)


def augmented_width(augment: Augment) -> int:
    """Numbers that `encode` appends to an encoded condition: 0 unless changes are told."""
    if not augment.conditioned:
        return 0
    return (
        int(augment.flip)
        + 3 * (augment.shift_voxels > 0)
        + 3 * (augment.rotate_degrees > 0)
        + (augment.scale > 0)
        + 2 * (augment.intensity > 0)
    )


def encode(augment: Augment, change: Change) -> Tensor:
    """(A,) float32 of what was done, A being `augmented_width`; zero is nothing.

    A flip is 0 or 1; all else is within [-1, 1] (the logarithm of a scale slightly beyond).
    """
    values: list[float] = []
    if augmented_width(augment) == 0:
        return torch.zeros(0)
    if augment.flip:
        values.append(float(change.flip))
    if augment.shift_voxels > 0:
        values += (change.shift_voxels / augment.shift_voxels).tolist()
    if augment.rotate_degrees > 0:
        values += (change.angles / math.radians(augment.rotate_degrees)).tolist()
    if augment.scale > 0:
        values.append(math.log(change.scale) / math.log1p(augment.scale))
    if augment.intensity > 0:
        values += [(v - 1) / augment.intensity for v in (change.gain, change.power)]
    return torch.tensor(values, dtype=torch.float32)


def apply(change: Change, x: Tensor, spacing_mm: Sequence[float], images: Tensor) -> Tensor:
    """A scan (C, X, Y, Z) with the change done to it; `images` (C,) is False for a mask."""
    nx, ny, nz = x.shape[1:]
    moved = change.flip or change.scale != 1
    if moved or change.angles.any() or change.shift_voxels.any():
        x = apply_transforms(x[None], transform(change, (nx, ny, nz), spacing_mm)[None])[0]
    if change.gain != 1 or change.power != 1:
        x = x.clone()
        x[images] = x[images].clamp(min=0) ** change.power * change.gain
    return x


def transform(change: Change, grid: tuple[int, int, int], spacing_mm: Sequence[float]) -> Tensor:
    """(3, 4) map from output to input in coordinates that run from -1 to 1 along each axis.

    Rotations are about the grid's centre and in millimetres, so that they stay rigid on
    anisotropic voxels.
    """
    rotation = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(change.angles):
        i, j = [a for a in range(3) if a != axis]
        r = torch.eye(3, dtype=torch.float64)
        r[i, i] = r[j, j] = angle.cos()
        r[i, j], r[j, i] = -angle.sin(), angle.sin()
        rotation = rotation @ r
    half_mm = torch.tensor(
        [n * s / 2 for n, s in zip(grid, spacing_mm, strict=True)], dtype=torch.float64
    )
    linear = (rotation * change.scale) * half_mm / half_mm[:, None]
    linear[:, 0] = linear[:, 0] * (-1.0 if change.flip else 1.0)
    offset = 2 * change.shift_voxels / torch.tensor(grid, dtype=torch.float64)
    return torch.cat([linear, offset[:, None]], 1).float()


def apply_transforms(x: Tensor, transforms: Tensor) -> Tensor:
    """Resample (N, C, X, Y, Z) volumes by (N, 3, 4) maps from `transform`, edges repeated."""
    centres = [(2 * torch.arange(n) + 1) / n - 1 for n in x.shape[2:]]
    # grid_sample counts coordinates from the last axis to the first
    along = transforms[:, [2, 1, 0], :, None, None, None]
    where = along[:, :, 0] * centres[0][:, None, None] + along[:, :, 1] * centres[1][:, None]
    where = where + (along[:, :, 2] * centres[2] + along[:, :, 3])
    return F.grid_sample(x, where.movedim(1, -1), padding_mode="border", align_corners=False)
