"""Pictures: the right way up, the right shape, the same bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from synthmed.report.mosaic import GAP_PIXELS, SIDE_PIXELS, png, three_planes

STEP = SIDE_PIXELS + GAP_PIXELS


def bright_at(where: tuple[slice, slice, slice]) -> list[tuple[float, float]]:
    """Centre (row, column as a share of each plane) of what is bright, plane by plane."""
    data = np.zeros((32, 32, 32), np.float32)
    data[where] = 1
    planes = three_planes(data, np.eye(4)).astype(float)
    centres = []
    for i in range(3):
        plane = planes[:, i * STEP : i * STEP + SIDE_PIXELS]
        rows, columns = np.nonzero(plane > 200)
        centres.append((rows.mean() / SIDE_PIXELS, columns.mean() / SIDE_PIXELS))
    return centres


def test_orientation() -> None:
    everything = slice(None)
    axial, coronal, _ = bright_at((slice(24, 32), everything, everything))  # the person's right
    assert axial[1] < 0.2 and coronal[1] < 0.2
    data = (everything, slice(24, 32), everything)  # the nose
    planes = three_planes(_block(data), np.eye(4))
    assert planes[:20, 64].mean() > 200 and planes[-20:, 64].mean() < 50
    assert planes[64, 2 * STEP + 10] > 200 and planes[64, -10] < 50
    data = (everything, everything, slice(24, 32))  # the top of the head
    planes = three_planes(_block(data), np.eye(4))
    assert planes[10, STEP + 64] > 200 and planes[-10, STEP + 64] < 50
    assert planes[10, 2 * STEP + 64] > 200 and planes[-10, 2 * STEP + 64] < 50


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
    import io

    assert np.array_equal(np.asarray(image.open(io.BytesIO(content))), grey)


def test_a_volume_with_nothing_in_it() -> None:
    flat = np.full((8, 8, 8), np.nan, np.float32)
    assert three_planes(flat, np.eye(4)).max() == 0
