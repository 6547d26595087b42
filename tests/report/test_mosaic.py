"""Pictures: the right way up, the right shape, the same bytes."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from synthmed.report.mosaic import (
    GAP_PIXELS,
    PALETTE,
    SIDE_PIXELS,
    largest,
    outlined,
    png,
    three_planes,
    tinted,
)

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


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def drawn_in(picture: np.ndarray, colour: str) -> np.ndarray:
    return np.asarray((picture == rgb(colour)).all(-1))


def test_an_outline_lies_on_the_border_of_its_label_and_nowhere_else() -> None:
    """A cube of 8 voxels, 4 pixels each, in the middle: its border is a square of 32 pixels."""
    labels = np.zeros((32, 32, 32), np.int64)
    labels[12:20, 12:20, 12:20] = 2
    grey = three_planes(np.random.default_rng(0).random((32, 32, 32)), np.eye(4))
    picture = outlined(grey, [labels], np.eye(4))
    expected = np.zeros((SIDE_PIXELS, SIDE_PIXELS), bool)
    expected[48:80, 48:80] = True
    expected[49:79, 49:79] = False
    for left in (0, STEP, 2 * STEP):
        square = picture[:, left : left + SIDE_PIXELS]
        assert np.array_equal(drawn_in(square, PALETTE[1]), expected)
        assert np.array_equal(square[~expected], np.repeat(
            grey[:, left : left + SIDE_PIXELS][~expected][:, None], 3, 1))  # fmt: skip
    assert not drawn_in(picture, PALETTE[0]).any()


def test_an_outline_turns_with_its_image() -> None:
    """A mark in the right front top corner is where the image is bright, in every plane."""
    labels = np.zeros((16, 16, 16), np.int64)
    labels[12:, 12:, 12:] = 1
    at = (13, 13, 13)
    image = three_planes(labels, np.diag([1.0, 1.5, 2, 1]), at)
    picture = outlined(image, [labels], np.diag([1.0, 1.5, 2, 1]), at)
    mark = drawn_in(picture, PALETTE[0])
    assert mark.any()
    # where two borders of linear interpolation cross, a quarter of the brightness is left
    assert image[mark].min() >= 64
    assert [mark[:, k : k + SIDE_PIXELS].any() for k in (0, STEP, 2 * STEP)] == [True] * 3


def test_two_masks_keep_their_own_colours() -> None:
    first, second = np.zeros((2, 16, 16, 16), np.int64)
    first[2:6] = 1
    second[10:14] = len(PALETTE) + 1  # an eighth label has the first colour again
    at = (4, 8, 8)
    picture = outlined(np.zeros((128, 388), np.uint8), [first, second], np.eye(4), at)
    mark = drawn_in(picture, PALETTE[0])
    assert mark[:, :64].any() and mark[:, 64:128].any()
    assert drawn_in(picture, PALETTE[1]).sum() == 0


def test_slices_are_cut_where_the_masks_are_largest() -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    assert largest([mask]) is None
    mask[2, 3:5, 4:9] = 7  # one plane along X, the same area in two along Y, in five along Z
    assert largest([mask]) == (2, 4, 6)
    other = np.zeros_like(mask)
    other[9, :, :] = 1
    assert largest([mask, other])[0] == 9  # type: ignore[index]


def test_colours_read_back() -> None:
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (5, 9, 3)).astype(np.uint8)
    image = pytest.importorskip("PIL.Image")
    assert np.array_equal(np.asarray(image.open(io.BytesIO(png(colour)))), colour)


def test_colours_are_told_apart() -> None:
    """Also by people who see no red or no green (Vienot et al. 1999, simulated in linear RGB)."""
    linear = (np.array([rgb(c) for c in PALETTE]) / 255) ** 2.2
    for matrix in (np.eye(3), PROTANOPIA, DEUTERANOPIA):
        seen = (linear @ matrix.T).clip(0, 1) ** (1 / 2.2) * 255
        apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(apart) > 25


PROTANOPIA = np.array([[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.0040, -0.0040, 1]])
DEUTERANOPIA = np.array([[0.2927, 0.7073, 0], [0.2927, 0.7073, 0], [-0.0223, 0.0223, 1]])


def test_what_a_mask_covers_is_tinted() -> None:
    volume = np.random.default_rng(0).uniform(size=(20, 24, 28)).astype(np.float32)
    mask = np.zeros(volume.shape, bool)
    mask[:, 12:] = True  # the front half
    grey = three_planes(volume, np.eye(4))
    picture = tinted(grey, mask, np.eye(4)).astype(int)
    colour = (picture != picture[..., :1]).any(axis=2)
    assert (picture[~colour] == grey[~colour][:, None]).all()
    axial, sagittal = colour[:, :128], colour[:, 260:]
    assert axial[:64].any() and not axial[64:].any()  # the nose is up
    assert sagittal[:, :64].any() and not sagittal[:, 64:].any()  # and to the left
    coronal = slice(STEP, STEP + SIDE_PIXELS)  # its slice is one of the covered
    assert (colour | (grey == 0))[:, coronal].all() and colour[:, coronal].any()
