"""Three slices of a volume as a small PNG, the same bytes every time; masks are outlined on it.

Planes are drawn as a radiologist reads them: axial with the nose up, coronal with the head up,
both with the person's right on the left of the picture, sagittal with the nose to the left.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.types import Affine, Array

Grey = npt.NDArray[np.uint8]
"""(rows, columns)."""
Picture = npt.NDArray[np.uint8]
"""(rows, columns), or (rows, columns, 3) for red, green and blue."""
Voxel = tuple[int, int, int]

SIDE_PIXELS = 128
"""Side of the square that each plane is fitted into."""

GAP_PIXELS = 2

PALETTE = ("#D55E00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
"""Colours that people with any common colour blindness tell apart (Okabe and Ito 2008), those
that differ most on grey first; an eighth label has the first colour again."""


def three_planes(volume: npt.NDArray[Any], affine: Affine, at: Voxel | None = None) -> Grey:
    """Axial, coronal and sagittal slices beside each other, (128, 388) grey values.

    Args:
        volume: (X, Y, Z), RAS+; scaled between its 0.5 and 99.5 percentiles. Of a single slice
            there is one picture, (128, 128).
        affine: (4, 4) voxel to mm, for the shape of a voxel.
        at: where the slices cross; the centre by default.
    """
    data = np.nan_to_num(np.asarray(volume, dtype=np.float32))
    low, high = np.percentile(data, (0.5, 99.5))
    data = np.clip((data - low) / max(float(high - low), 1e-6), 0, 1)
    return np.rint(_planes(data, affine, at, _resized) * 255).astype(np.uint8)


def outlined(
    grey: Grey, masks: Sequence[npt.NDArray[np.integer]], affine: Affine, at: Voxel | None = None
) -> Picture:
    """Slices with the border of every label drawn in its colour, (128, 388, 3).

    Args:
        grey: what `three_planes` gave for the same grid and place.
        masks: label maps (X, Y, Z) whose values count through `PALETTE`, 1 being the first; 0
            is drawn in none of them.
        affine: as for `three_planes`.
        at: likewise.
    """
    colours = _colours()
    out = np.repeat(grey[..., None], 3, axis=2)
    for mask in masks:
        labels = _planes(mask.astype(np.float32), affine, at, _nearest).astype(np.int64)
        padded = np.pad(labels, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        border = (labels > 0) & np.any([labels != n for n in around], axis=0)
        out[border] = colours[(labels[border] - 1) % len(colours)]
    return out


def tinted(
    grey: Grey, mask: npt.NDArray[np.bool_], affine: Affine, at: Voxel | None = None
) -> Picture:
    """Slices with what a mask covers in the first colour, half transparent, (128, 388, 3).

    Args:
        grey: what `three_planes` gave for the same grid and place.
        mask: (X, Y, Z).
        affine: as for `three_planes`.
        at: likewise.
    """
    out = np.repeat(grey[..., None], 3, axis=2)
    covered = _planes(mask.astype(np.float32), affine, at, _nearest) > 0
    out[covered] = out[covered] // 2 + _colours()[0] // 2
    return out


def largest(masks: Sequence[npt.NDArray[np.integer]]) -> Voxel | None:
    """Where slices show most of the masks: per axis the fullest plane; null where all are empty."""
    union = np.any([m > 0 for m in masks], axis=0)
    if not union.any():
        return None
    where = []
    for axis in range(3):
        area = union.sum(axis=tuple(a for a in range(3) if a != axis))
        fullest = np.flatnonzero(area == area.max())
        # of several the one nearest to the centre
        where.append(int(fullest[np.abs(fullest - len(area) // 2).argmin()]))
    return where[0], where[1], where[2]


def _colours() -> npt.NDArray[np.uint8]:
    """`PALETTE` as (7, 3) red, green and blue."""
    return np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE], np.uint8)


def _planes(
    data: Array, affine: Affine, at: Voxel | None, resize: Callable[[Array, int, int], Array]
) -> Array:
    """The three slices in their squares, (128, 388), 0 outside."""
    dx, dy, dz = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = at or (n // 2 for n in data.shape)
    planes = (  # rows from the top of the picture, columns from its left
        (data[::-1, ::-1, z].T, dy, dx),
        (data[::-1, y, ::-1].T, dz, dx),
        (data[x, ::-1, ::-1].T, dz, dy),
    )
    shown = [p for p in planes if min(p[0].shape) > 1]
    longest_mm = max(max(p.shape[0] * row, p.shape[1] * column) for p, row, column in shown)
    columns = len(shown) * (SIDE_PIXELS + GAP_PIXELS) - GAP_PIXELS
    out = np.zeros((SIDE_PIXELS, columns), dtype=np.float32)
    for i, (plane, row_mm, column_mm) in enumerate(shown):
        height = max(1, round(plane.shape[0] * row_mm / longest_mm * SIDE_PIXELS))
        width = max(1, round(plane.shape[1] * column_mm / longest_mm * SIDE_PIXELS))
        top = (SIDE_PIXELS - height) // 2
        left = i * (SIDE_PIXELS + GAP_PIXELS) + (SIDE_PIXELS - width) // 2
        out[top : top + height, left : left + width] = resize(plane, height, width)
    return out


def png(picture: Picture) -> bytes:
    """8-bit PNG, grey or colour, without any chunk but the pixels."""
    rows, columns = picture.shape[:2]
    colour_type = 0 if picture.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", columns, rows, 8, colour_type, 0, 0, 0)
    values = picture.reshape(rows, -1)
    lines = np.zeros((rows, values.shape[1] + 1), dtype=np.uint8)  # filter type 0 before each
    lines[:, 1:] = values
    pixels = zlib.compress(lines.tobytes(), 9)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    """PNG 5.3: length, type, data, CRC of type and data."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _resized(plane: Array, height: int, width: int) -> Array:
    """Bilinear resampling between voxel centres, one axis after the other."""
    for axis, size in ((0, height), (1, width)):
        n = plane.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        below = np.floor(at).astype(np.intp)
        above = np.minimum(below + 1, n - 1)
        share = (at - below).astype(np.float32)
        share = share[:, None] if axis == 0 else share[None, :]
        lower, upper = np.take(plane, below, axis), np.take(plane, above, axis)
        plane = lower * (1 - share) + upper * share
    return plane


def _nearest(plane: Array, height: int, width: int) -> Array:
    """Nearest-neighbour resampling: labels are never mixed."""
    rows, columns = (
        ((np.arange(size) + 0.5) * n / size).astype(np.intp)
        for n, size in zip(plane.shape, (height, width), strict=True)
    )
    return plane[np.ix_(rows, columns)]
