"""How alike two scans are at best when one is moved: on the CPU, or on CUDA.

`ImageSimilarity` makes the features and says what the moves are for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from synthmed.metrics.similarity import HALVES, Features
from synthmed.metrics.stats import Floats, Ints

FAR_SHIFT = 2
"""Whole-voxel shifts up to this, along every axis at once, of the untransformed scan."""
HALF_SHIFT = 2.0
"""Length in voxels of the furthest shift by half voxels, of the view of tissue."""
SCALES = (0.95, 1.05)
ROTATE_DEGREES = 6.0
ANEW = 6
"""References of a closer look at which a query is averaged anew: one more than the copies test
compares (`copies.FEW`), so that an average of many comes as near to the last of them as to one."""
CHUNK_SCANS = 64
"""Queries transformed at a time: bounds memory at twice 28 MB a channel, as they are and mirrored,
and a few copies of 4 MB."""
CHUNK_CUDA = 512
"""The same on CUDA, where small products leave the device idle: twice 226 MB a channel."""

Shift = tuple[int, int, int]
Place = tuple[float, float, float]


@dataclass(frozen=True)
class Move:
    """A shift of the bank: mirrored or not, on which grid of `HALVES`, and by how many voxels."""

    mirrored: bool
    grid: int
    shift: Shift

    @property
    def place(self) -> Place:
        """Where it brings the scan, in voxels of the averaged grid."""
        x, y, z = HALVES[self.grid]
        ahead = (-x if self.mirrored else x, y, z)
        a, b, c = (s - k / 2 for s, k in zip(self.shift, ahead, strict=True))
        return a, b, c


def best_correlations(queries: Features, references: Features, device: str) -> tuple[Floats, Ints]:
    """(n_queries, n_references) largest Pearson correlation over the bank, and the best shift.

    The first is of all moves of the query; the second says which of `shifts` is the best of these.
    A constant scan correlates with nobody: 0. One matrix product a move and chunk of queries.

    Args:
        queries: (n, G, C, x, y, z), on G grids as `HALVES` has them, or on one.
        references: (m, C, x, y, z), mean 0.
        device: torch device. Those of two devices agree to the rounding of float32.
    """
    flat = _unit(_tensor(references, device))
    best = torch.full((len(queries), len(flat)), -1.0, device=device)
    where = torch.zeros(best.shape, dtype=torch.int16, device=device)
    chunk = CHUNK_CUDA if device.startswith("cuda") else CHUNK_SCANS
    for start in range(0, len(queries), chunk):
        rows, at = best[start : start + chunk], where[start : start + chunk]
        part = _tensor(queries[start : start + chunk], device)
        for k, query in enumerate(shifted(part)):
            found = _correlation(query, flat)
            at.masked_fill_(found > rows, k)
            torch.maximum(rows, found, out=rows)
        for query in transformed(part):
            torch.maximum(rows, _correlation(query, flat), out=rows)
    return np.asarray(best.cpu().double().numpy()), where.cpu().numpy().astype(np.int64)


def closer_correlations(
    query: Features,
    references: Features,
    where: Ints,
    again: Callable[[Place, bool], Features],
) -> Floats:
    """(k,) correlations of a query with references where it is moved as far as each pair asks for.

    The bank moves by whole voxels of the averaged grid, and a third of one away from where it
    belongs a copy has lost its detail. Between a shift and its neighbours along an axis lies the
    top of the parabola through their three correlations. There the scan itself is averaged anew
    (`again`), which for a move by whole voxels of the scan is exact: for the `ANEW` references
    whose parabolas are the highest; of the others nothing is found, -1.

    Args:
        query: (C, x, y, z).
        references: (k, C, x, y, z), mean 0.
        where: (k,) the best of `shifts` for each.
        again: the query's (C, x, y, z), mirrored or not, on a grid that lies so far ahead, from 0
            to 1 along each axis.
    """
    part, flat = _tensor(query[None], "cpu"), _unit(_tensor(references, "cpu"))
    bank = shifts(1)
    tops = [_top(part, flat[i : i + 1], bank[int(k)]) for i, k in enumerate(where)]
    out = np.full(len(tops), -1.0)
    for i in sorted(range(len(tops)), key=lambda i: -tops[i].height)[:ANEW]:
        place = tops[i].place
        # a grid that lies ahead moves what is on it back
        shift = [math.ceil(p) for p in place]
        a, b, c = (s - p for s, p in zip(shift, place, strict=True))
        moved = _tensor(again((a, b, c), bank[int(where[i])].mirrored)[None], "cpu")
        out[i] = float(_correlation(_shifted(moved, shift), flat[i : i + 1]))
    return out


class _Top(NamedTuple):
    """The top of the parabolas about a shift."""

    place: Place
    height: float


def _top(query: Tensor, reference: Tensor, move: Move) -> _Top:
    mirrored = query.flip(2) if move.mirrored else query

    def at(shift: Sequence[int]) -> float:
        return float(_correlation(_shifted(mirrored, shift), reference))

    here, place = at(move.shift), []
    height = here
    for axis, s in enumerate(move.shift):
        low, high = (at((*move.shift[:axis], s + by, *move.shift[axis + 1 :])) for by in (-1, 1))
        curve, slope = 2 * here - low - high, (high - low) / 2
        off = min(max(slope / curve, -0.5), 0.5) if curve > 1e-9 else 0.0
        place.append(s + off)
        height += slope * off - curve * off**2 / 2
    a, b, c = place
    return _Top((a, b, c), height)


def _unit(references: Tensor) -> Tensor:
    """(m, C x y z) of (m, C, x, y, z), each of norm 1, or 0; in place, for all lie in memory."""
    flat = references.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat /= torch.where(norm > 1e-6, norm, torch.inf)
    return flat


def _tensor(features: Features, device: str) -> Tensor:
    return torch.from_numpy(features.astype(np.float32)).to(device)


def _correlation(query: Tensor, references: Tensor) -> Tensor:
    """(n, m) Pearson correlations of (n, C, x, y, z) and (m, C x y z) of mean 0 and norm 1.

    References have mean 0, so a query need not be centred for the dot product, only for its norm.
    """
    flat = query.flatten(1)
    score = flat @ references.T
    square = torch.linalg.vector_norm(flat, dim=1) ** 2 - flat.sum(dim=1) ** 2 / flat.shape[1]
    norm = square.clamp(min=0).sqrt()[:, None]
    return torch.where(norm > 1e-3, score / norm, 0)


def shifted(features: Tensor) -> Iterator[Tensor]:
    """Every shift (n, C, x, y, z) of (n, G, C, x, y, z), in the order of `shifts`."""
    mirrored = features.flip(3)
    for move in shifts(features.shape[1]):
        yield _shifted((mirrored if move.mirrored else features)[:, move.grid], move.shift)


def transformed(features: Tensor) -> Iterator[Tensor]:
    """Every scaled or rotated version of the same, mirrored or not, with its small shifts."""
    for grids in (features, features.flip(3)):
        for moved in affines(grids[:, 0]):
            for shift in _near_shifts():
                yield _shifted(moved, shift)


@lru_cache(maxsize=2)
def shifts(n_grids: int) -> list[Move]:
    """The shifts of the bank: by whole voxels on one grid, by half voxels on eight.

    On a grid that lies half a voxel ahead a scan has moved by half a voxel back, or, mirrored, on.
    """
    out = []
    for mirrored in (False, True):
        if n_grids == 1:
            reach = range(-FAR_SHIFT, FAR_SHIFT + 1)
            out += [Move(mirrored, 0, s) for s in itertools.product(reach, reach, reach)]
            continue
        reach = range(-FAR_SHIFT - 1, FAR_SHIFT + 2)
        for grid in range(len(HALVES)):
            for shift in itertools.product(reach, reach, reach):
                move = Move(mirrored, grid, shift)
                if sum(p**2 for p in move.place) <= HALF_SHIFT**2:
                    out.append(move)
    return out


def _near_shifts() -> list[Shift]:
    """No shift, and one voxel either way along one axis."""
    return [
        s for s in itertools.product((-1, 0, 1), (-1, 0, 1), (-1, 0, 1)) if sum(map(abs, s)) < 2
    ]


def _shifted(volumes: Tensor, shift: Sequence[int]) -> Tensor:
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
