"""Pictures: the right way up, the right shape, the same bytes."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from synthmed.report.mosaic import GAP_PIXELS, SIDE_PIXELS, png, three_planes

STEP = SIDE_PIXELS + GAP_PIXELS


def test_orientation() -> None:
    everything = slice(None)
    planes = three_planes(_block((slice(24, 32), everything, everything)), np.eye(4))
    assert planes[64, 10] > 200
    assert planes[64, 118] < 50
    assert planes[64, STEP + 10] > 200
    assert planes[64, STEP + 118] < 50
    planes = three_planes(_block((everything, slice(24, 32), everything)), np.eye(4))
    assert planes[10, 64] > 200
    assert planes[118, 64] < 50
    assert planes[64, 2 * STEP + 10] > 200
    assert planes[64, 2 * STEP + 118] < 50
    planes = three_planes(_block((everything, everything, slice(24, 32))), np.eye(4))
    assert planes[10, STEP + 64] > 200
    assert planes[118, STEP + 64] < 50
    assert planes[10, 2 * STEP + 64] > 200
    assert planes[118, 2 * STEP + 64] < 50


def _block(where: tuple[slice, slice, slice]) -> np.ndarray:
    data = np.zeros((32, 32, 32), np.float32)
    data[where] = 1
    return data


def test_voxel_shape_is_kept() -> None:
    data = np.ones((20, 20, 5), np.float32)
    data[0, 0, 0] = 0
    data[:10] = 2
    coronal = three_planes(data, np.diag([2.0, 2, 8, 1]))[:, STEP : STEP + SIDE_PIXELS]
    assert coronal[0].max() > 0  # 5 slices of 8 mm are as high as 20 of 2 mm are wide


def test_png_reads_back_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (7, 11)).astype(np.uint8)
    content = png(grey)
    assert content == png(grey.copy())
    assert struct.unpack(">II", content[16:24]) == (11, 7)
    image = pytest.importorskip("PIL.Image")
    assert np.array_equal(np.asarray(image.open(io.BytesIO(content))), grey)


def test_a_volume_with_nothing_in_it() -> None:
    flat = np.full((8, 8, 8), np.nan, np.float32)
    assert three_planes(flat, np.eye(4)).max() == 0
