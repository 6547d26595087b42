"""Random changes of training scans: where a known point goes, and that nothing asked is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthmed.augment import (
    Change,
    apply,
    apply_transforms,
    augmented_width,
    draw_change,
    encode,
    transform,
)
from synthmed.config import Augment
from synthmed.keys import torch_generator

GRID = (20, 24, 12)
SPACING = (2.0, 1.5, 4.0)


def spot(at_mm: np.ndarray, width_mm: float = 5.0) -> torch.Tensor:
    """A Gaussian spot at millimetres from the grid's centre: (1, 1, X, Y, Z)."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(GRID, SPACING, strict=True)]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"))
    distance = ((mesh - at_mm[:, None, None, None]) ** 2).sum(0)
    return torch.from_numpy(np.exp(-distance / (2 * width_mm**2))).float()[None, None]


def centre_mm(x: torch.Tensor) -> np.ndarray:
    volume = x[0, 0].numpy().astype(float)
    volume = np.where(volume > 0.05, volume, 0)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(GRID, SPACING, strict=True)]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"))
    return np.asarray((mesh * volume).sum((1, 2, 3)) / volume.sum())


def drawn(augment: Augment, seed: int) -> torch.Tensor:
    return transform(draw_change(augment, torch_generator(seed)), GRID, SPACING)[None]


def in_mm(moves: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The map from output to input in millimetres about the centre: (3, 3) and (3,)."""
    half = np.array(GRID) * np.array(SPACING) / 2
    m = moves[0].numpy().astype(float)
    return m[:, :3] * half[:, None] / half, m[:, 3] * half


def test_nothing_asked_is_the_identity() -> None:
    nothing = Augment()
    expected = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)[None]
    torch.testing.assert_close(drawn(nothing, 3), expected, rtol=0, atol=1e-7)
    x = torch.rand(2, *GRID)
    torch.testing.assert_close(apply_transforms(x[None], expected)[0], x, rtol=0, atol=1e-5)
    change = draw_change(nothing, torch_generator(1))
    assert apply(change, x, SPACING, torch.tensor([True, False])) is x
    assert augmented_width(nothing) == 0
    assert encode(nothing, change).shape == (0,)


@pytest.mark.parametrize("probability", [0.2, 0.5, 1.0])
def test_the_other_scans_are_left_as_they_are(probability: float) -> None:
    """To the bit, since what is interpolated is blurred; moving and brightening by themselves."""
    n = 600
    augment = Augment(
        shift_voxels=3, rotate_degrees=9, scale=0.1, intensity=0.2, probability=probability
    )
    x, images = torch.rand(1, 4, 4, 4), torch.tensor([True])
    moved = brightened = both = same = 0
    for seed in range(n):
        change = draw_change(augment, torch_generator(seed))
        told = encode(augment, change)
        moved += bool(told[:7].any())
        brightened += bool(told[7:].any())
        both += bool(told[:7].any() and told[7:].any())
        assert bool(told[:3].all()) == bool(told[:7].any()), "shifted, turned and scaled together"
        if not told.any():
            assert apply(change, x, SPACING, images) is x
            same += 1
    wanted = {"moved": probability, "brightened": probability, "both": probability**2}
    wanted["same"] = (1 - probability) ** 2
    for name, count in {
        "moved": moved, "brightened": brightened, "both": both, "same": same
    }.items():  # fmt: skip
        p = wanted[name]
        assert abs(count / n - p) <= 4 * math.sqrt(p * (1 - p) / n), name


def test_a_flip_mirrors_left_and_right_alone() -> None:
    augment = Augment(flip=True)
    x = torch.rand(1, 1, *GRID)
    seen = set()
    for seed in range(20):
        moved = apply_transforms(x, drawn(augment, seed))
        flipped = not torch.allclose(moved, x, atol=1e-4)
        if flipped:
            torch.testing.assert_close(moved, x.flip(2), rtol=0, atol=1e-4)
        seen.add(flipped)
    assert seen == {True, False}, "about half of all scans"


def test_a_shift_is_in_voxels_of_each_axis() -> None:
    augment = Augment(shift_voxels=3, probability=1)
    start = np.array([4.0, -5.0, 6.0])
    for seed in range(5):
        moves = drawn(augment, seed)
        _, offset_mm = in_mm(moves)
        voxels = offset_mm / SPACING
        assert np.abs(voxels).max() <= 3
        moved = centre_mm(apply_transforms(spot(start), moves))
        # the map goes from output to input: content moves the other way
        np.testing.assert_allclose(moved, start - offset_mm, atol=0.7)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_rotations_are_rigid_on_anisotropic_voxels(seed: int) -> None:
    linear, offset = in_mm(drawn(Augment(rotate_degrees=30, probability=1), seed))
    np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-5)
    assert np.linalg.det(linear) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(offset, 0, atol=1e-6)
    # three turns of at most 30 degrees
    assert math.degrees(math.acos(min(1.0, (np.trace(linear) - 1) / 2))) <= 90


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_point_goes_where_the_rotation_says(seed: int) -> None:
    moves = drawn(Augment(rotate_degrees=25, scale=0.1, probability=1), seed)
    linear, _ = in_mm(moves)
    start = np.array([8.0, -6.0, 7.0])
    moved = centre_mm(apply_transforms(spot(start), moves))
    np.testing.assert_allclose(moved, np.linalg.solve(linear, start), atol=0.8)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_scale_stays_in_its_range(seed: int) -> None:
    linear, _ = in_mm(drawn(Augment(scale=0.2, probability=1), seed))
    factor = np.cbrt(np.linalg.det(linear))
    np.testing.assert_allclose(linear, np.eye(3) * factor, atol=1e-5)
    assert 0.8 <= factor <= 1.2
    change = draw_change(Augment(intensity=0.3, probability=1), torch_generator(seed))
    assert 0.7 <= change.gain <= 1.3
    assert 0.7 <= change.power <= 1.3


def test_all_channels_move_together_and_masks_stay_in_range() -> None:
    augment = Augment(flip=True, shift_voxels=2, rotate_degrees=15, scale=0.1, probability=1)
    mask = (spot(np.array([5.0, 4, -6])) > 0.5).float()
    both = torch.cat([mask, mask], 1)
    moved = apply_transforms(both, drawn(augment, 4))
    torch.testing.assert_close(moved[:, 0], moved[:, 1], rtol=0, atol=0)
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-6
    assert moved.sum() > 0


ALL = Augment(flip=True, shift_voxels=2, rotate_degrees=15, scale=0.1, intensity=0.2, probability=1)


def test_apply_resamples_against_the_library_s_own_grid() -> None:
    """The coordinates are those of torch's affine_grid, which counts axes from the last."""
    x = torch.rand(3, *GRID, generator=torch_generator(0))
    change = draw_change(ALL, torch_generator(5))
    m = transform(change, GRID, SPACING)
    theta = torch.cat([m[[2, 1, 0]][:, [2, 1, 0]], m[[2, 1, 0], 3:]], 1)[None]
    where = torch.nn.functional.affine_grid(theta, [1, 3, *GRID], align_corners=False)
    expected = torch.nn.functional.grid_sample(
        x[None], where, padding_mode="border", align_corners=False
    )
    images = torch.tensor([True, False, True])
    expected[0, images] = expected[0, images] ** change.power * change.gain
    got = apply(change, x, SPACING, images)
    torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_what_was_done_is_told_within_one_and_tells_the_change(seed: int) -> None:
    change = draw_change(ALL, torch_generator(seed))
    told = encode(ALL, change)
    assert len(told) == augmented_width(ALL) == 10
    assert told[0] in (0, 1)
    assert told.abs().max() <= 1.12  # log(0.9) / log(1.1)
    again = Change(
        flip=bool(told[0]),
        angles=told[4:7].double() * math.radians(15),
        scale=1.1 ** float(told[7]),
        shift_voxels=told[1:4].double() * 2,
        gain=1 + 0.2 * float(told[8]),
        power=1 + 0.2 * float(told[9]),
    )
    torch.testing.assert_close(
        transform(again, GRID, SPACING), transform(change, GRID, SPACING), rtol=0, atol=1e-5
    )
    assert (again.gain, again.power) == pytest.approx((change.gain, change.power), abs=1e-6)


def test_nothing_done_is_told_as_zero_and_only_what_is_on_is_told() -> None:
    still = Change(False, torch.zeros(3), 1.0, torch.zeros(3), 1.0, 1.0)
    assert torch.equal(encode(ALL, still), torch.zeros(10))
    assert augmented_width(Augment(flip=True)) == 1
    assert augmented_width(Augment(scale=0.1, intensity=0.1)) == 3
    assert augmented_width(ALL.model_copy(update={"conditioned": False})) == 0
