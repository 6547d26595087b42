"""Random changes of training scans, each keyed by (step, patient): see `config.Augment`."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from synthmed.config import Augment


def draw_transform(
    augment: Augment, grid: tuple[int, int, int], spacing_mm: tuple[float, ...], g: Generator
) -> Tensor:
    """(3, 4) map from output to input in the [-1, 1] coordinates of `affine_grid`.

    Rotations are about the grid's centre and in millimetres, so that they stay rigid on
    anisotropic voxels. Axes are X, Y, Z.
    """

    def uniform(n: int) -> Tensor:
        return 2 * torch.rand(n, generator=g, dtype=torch.float64) - 1

    angles = uniform(3) * math.radians(augment.rotate_degrees)
    scale = 1 + uniform(1) * augment.scale
    shift = uniform(3) * augment.shift_voxels
    flip = -1.0 if augment.flip and uniform(1).item() < 0 else 1.0
    rotation = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        r = torch.eye(3, dtype=torch.float64)
        r[i, i] = r[j, j] = angle.cos()
        r[i, j], r[j, i] = -angle.sin(), angle.sin()
        rotation = rotation @ r
    half_mm = torch.tensor(
        [n * s / 2 for n, s in zip(grid, spacing_mm, strict=True)], dtype=torch.float64
    )
    linear = (rotation * scale) * half_mm / half_mm[:, None]
    linear[:, 0] = linear[:, 0] * flip
    offset = 2 * shift / torch.tensor(grid, dtype=torch.float64)
    return torch.cat([linear, offset[:, None]], 1).float()


def apply_transforms(x: Tensor, transforms: Tensor) -> Tensor:
    """Resample (N, C, X, Y, Z) volumes by (N, 3, 4) maps from `draw_transform`, edges repeated."""
    # affine_grid counts coordinates from the last axis to the first
    reverse = torch.tensor([2, 1, 0])
    theta = torch.cat([transforms[:, reverse][:, :, reverse], transforms[:, reverse, 3:]], 2)
    where = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, where, padding_mode="border", align_corners=False)


def draw_intensity(augment: Augment, g: Generator) -> tuple[float, float]:
    """Gain and exponent of a scan's brightness, both near 1."""
    gain, power = 1 + (2 * torch.rand(2, generator=g) - 1) * augment.intensity
    return float(gain), float(power)


def is_geometric(augment: Augment) -> bool:
    """Whether any spatial change is asked for."""
    return augment.flip or max(augment.shift_voxels, augment.rotate_degrees, augment.scale) > 0
