"""Three central slices of a volume as a small greyscale PNG, the same bytes every time.

Planes are drawn as a radiologist reads them: axial with the nose up, coronal with the head up,
both with the person's right on the left of the picture, sagittal with the nose to the left.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.types import Affine, Array

Grey = npt.NDArray[np.uint8]

SIDE_PIXELS = 128
"""Side of the square that each plane is fitted into."""

GAP_PIXELS = 2


def three_planes(volume: npt.NDArray[Any], affine: Affine) -> Grey:
    """Axial, coronal and sagittal central slices beside each other, (128, 388) grey values.

    Args:
        volume: (X, Y, Z), RAS+; scaled between its 0.5 and 99.5 percentiles.
        affine: (4, 4) voxel to mm, for the shape of a voxel.
    """
    data = np.nan_to_num(np.asarray(volume, dtype=np.float32))
    low, high = np.percentile(data, (0.5, 99.5))
    data = np.clip((data - low) / max(float(high - low), 1e-6), 0, 1)
    dx, dy, dz = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (n // 2 for n in data.shape)
    planes = (  # rows from the top of the picture, columns from its left
        (data[::-1, ::-1, z].T, dy, dx),
        (data[::-1, y, ::-1].T, dz, dx),
        (data[x, ::-1, ::-1].T, dz, dy),
    )
    longest_mm = max(n * d for n, d in zip(data.shape, (dx, dy, dz), strict=True))
    out = np.zeros((SIDE_PIXELS, 3 * SIDE_PIXELS + 2 * GAP_PIXELS), dtype=np.float32)
    for i, (plane, row_mm, column_mm) in enumerate(planes):
        height = max(1, round(plane.shape[0] * row_mm / longest_mm * SIDE_PIXELS))
        width = max(1, round(plane.shape[1] * column_mm / longest_mm * SIDE_PIXELS))
        top = (SIDE_PIXELS - height) // 2
        left = i * (SIDE_PIXELS + GAP_PIXELS) + (SIDE_PIXELS - width) // 2
        out[top : top + height, left : left + width] = _resized(plane, height, width)
    return np.rint(out * 255).astype(np.uint8)


def png(grey: Grey) -> bytes:
    """8-bit greyscale PNG of (rows, columns) without any chunk but the pixels."""
    rows, columns = grey.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # filter type 0 before each line
    lines[:, 1:] = grey
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
