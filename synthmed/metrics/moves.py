"""How alike two scans are at best when one is moved: on the CPU, or on CUDA.

`ImageSimilarity` makes the features and says what the moves are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from synthmed.metrics.similarity import HALVES, Features
from synthmed.metrics.stats import Floats

FAR_SHIFT = 2
"""Whole-voxel shifts up to this, along every axis at once, of the untransformed scan."""
HALF_SHIFT = 2.0
"""Length in voxels of the furthest shift by half voxels, of the view of tissue."""
SCALES = (0.95, 1.05)
ROTATE_DEGREES = 6.0
CHUNK_SCANS = 64
"""Queries transformed at a time: bounds memory at twice 28 MB a channel, as they are and mirrored,
and a few copies of 4 MB."""
CHUNK_CUDA = 512
"""The same on CUDA, where small products leave the device idle: twice 226 MB a channel."""

Shift = tuple[int, int, int]


def best_correlations(queries: Features, references: Features, device: str) -> Floats:
    """(n_queries, n_references) largest Pearson correlation over the bank of moves of the query.

    A constant scan correlates with nobody: 0. One matrix product a move and chunk of queries.

    Args:
        queries: (n, G, C, x, y, z), on G grids as `HALVES` has them, or on one.
        references: (m, C, x, y, z), mean 0.
        device: torch device. Those of two devices agree to the rounding of float32.
    """
    flat = _tensor(references, device).flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat /= torch.where(norm > 1e-6, norm, torch.inf)  # in place: all of them lie in memory
    best = torch.full((len(queries), len(flat)), -1.0, device=device)
    chunk = CHUNK_CUDA if device.startswith("cuda") else CHUNK_SCANS
    for start in range(0, len(queries), chunk):
        rows = best[start : start + chunk]
        for query in moves(_tensor(queries[start : start + chunk], device)):
            score = query.flatten(1) @ flat.T
            torch.maximum(rows, _over_norm(score, query), out=rows)
    return np.asarray(best.cpu().double().numpy())


def _tensor(features: Features, device: str) -> Tensor:
    return torch.from_numpy(features.astype(np.float32)).to(device)


def _over_norm(score: Tensor, query: Tensor) -> Tensor:
    """Dot products to correlations: divided by the query's spread (references have norm 1).

    References have mean 0, so a query need not be centred for the dot product, only for its norm.
    """
    flat = query.flatten(1)
    square = torch.linalg.vector_norm(flat, dim=1) ** 2 - flat.sum(dim=1) ** 2 / flat.shape[1]
    norm = square.clamp(min=0).sqrt()[:, None]
    return torch.where(norm > 1e-3, score / norm, 0)


def moves(features: Tensor) -> Iterator[Tensor]:
    """The bank: every transform (n, C, x, y, z) of (n, G, C, x, y, z), one at a time."""
    for mirrored in (False, True):
        grids = features.flip(3) if mirrored else features
        if grids.shape[1] == 1:
            for shift in _far_shifts():
                yield _shifted(grids[:, 0], shift)
        else:
            for grid, shift in half_shifts(mirrored):
                yield _shifted(grids[:, grid], shift)
        for moved in affines(grids[:, 0]):
            for shift in _near_shifts():
                yield _shifted(moved, shift)


def _far_shifts() -> list[Shift]:
    reach = range(-FAR_SHIFT, FAR_SHIFT + 1)
    return list(itertools.product(reach, reach, reach))


@lru_cache(maxsize=2)
def half_shifts(mirrored: bool) -> list[tuple[int, Shift]]:
    """Shifts by half voxels: which grid of `HALVES`, and by how many whole voxels it moves.

    On a grid that lies half a voxel ahead a scan has moved by half a voxel back, or, mirrored, on.
    """
    out = []
    reach = range(-FAR_SHIFT - 1, FAR_SHIFT + 2)
    for grid, (ahead, y, z) in enumerate(HALVES):
        x = -ahead if mirrored else ahead
        for shift in itertools.product(reach, reach, reach):
            length = sum((s - k / 2) ** 2 for s, k in zip(shift, (x, y, z), strict=True))
            if length <= HALF_SHIFT**2:
                out.append((grid, shift))
    return out


def _near_shifts() -> list[Shift]:
    """No shift, and one voxel either way along one axis."""
    return [
        s for s in itertools.product((-1, 0, 1), (-1, 0, 1), (-1, 0, 1)) if sum(map(abs, s)) < 2
    ]


def _shifted(volumes: Tensor, shift: Shift) -> Tensor:
    """(n, C, x, y, z) moved by whole voxels, zero (the mean) where nothing moves in."""
    out = torch.zeros_like(volumes)
    to = [slice(max(0, s), n + min(0, s)) for s, n in zip(shift, volumes.shape[2:], strict=True)]
    source = [
        slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, volumes.shape[2:], strict=True)
    ]
    out[:, :, *to] = volumes[:, :, *source]
    return out


def affines(volumes: Tensor) -> Iterator[Tensor]:
    """The scaled and rotated versions of a chunk, by trilinear interpolation."""
    for linear in _linear_maps():
        # torch's coordinates run from -1 to 1 over the field of view and name the last axis first
        theta = torch.zeros(3, 4, device=volumes.device)
        theta[:, :3] = torch.from_numpy(linear[::-1, ::-1].astype(np.float32))
        grid = functional.affine_grid(theta[None], [1, 1, *volumes.shape[2:]], align_corners=False)
        # scans as channels, so that the weights of a voxel are found once for all
        moved = functional.grid_sample(volumes.flatten(0, 1)[None], grid, align_corners=False)
        yield moved.reshape(volumes.shape)


def _linear_maps() -> list[Floats]:
    """(3, 3) from a voxel of the result to its source, about the centre of the field of view.

    Coordinates are shares of the field of view along each axis.
    """
    maps = [np.eye(3) / scale for scale in SCALES]
    for a, b in ((1, 2), (0, 2), (0, 1)):
        for sign in (-1, 1):
            m = np.eye(3)
            m[a, a] = m[b, b] = np.cos(angle := np.deg2rad(ROTATE_DEGREES))
            m[a, b], m[b, a] = -sign * np.sin(angle), sign * np.sin(angle)
            maps.append(m)
    return maps
