"""The wavelet: against PyWavelets, against its own definition, exact both ways, on any grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from synthmed.backbones.nets.haar import Band, Haar, crop_to, pad_to
from synthmed.errors import UsageError

LEVELS = [0, 1, 2, 3]


def volumes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_one_level_is_pywavelets_haar() -> None:
    x = volumes(2, 3, 4, 6, 8, dtype=torch.float64)
    haar = Haar(1)
    y = haar.forward(x)
    for i, band in enumerate(haar.bands(3)):
        key = "".join("d" if high else "a" for high in band.high)
        found = pywt.dwtn(x[:, band.channel].numpy(), "haar", axes=(1, 2, 3))[key]
        np.testing.assert_allclose(y[:, i].numpy(), found, atol=1e-14)


@pytest.mark.parametrize("levels", [2, 3])
def test_deeper_levels_are_its_pyramid_with_the_details_folded(levels: int) -> None:
    """Each channel is the band that `bands` says, every 2^(levels - level)-th voxel from offset."""
    x = volumes(1, 2, 16, 8, 24, dtype=torch.float64)
    haar = Haar(levels)
    y = haar.forward(x)
    pyramids = [pywt.wavedecn(x[0, c].numpy(), "haar", level=levels) for c in range(2)]
    for i, band in enumerate(haar.bands(2)):
        pyramid = pyramids[band.channel]
        if band.low:
            found = pyramid[0]
        else:
            found = pyramid[levels - band.level + 1]["".join("ad"[high] for high in band.high)]
        step = 2 ** (levels - band.level)
        a, b, c = band.offset
        np.testing.assert_allclose(y[0, i], found[a::step, b::step, c::step], atol=1e-13)


@pytest.mark.parametrize("levels", LEVELS)
def test_it_is_orthonormal(levels: int) -> None:
    """Every column of its matrix has norm 1 and is orthogonal to the others."""
    side = 2**levels
    n = side**3
    units = torch.eye(n, dtype=torch.float64).reshape(n, 1, side, side, side)
    matrix = Haar(levels).forward(units).reshape(n, n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert abs(torch.linalg.det(matrix)) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.sampled_from(LEVELS),
    sides=st.tuples(*[st.integers(1, 3)] * 3),
    channels=st.integers(1, 3),
    leading=st.lists(st.integers(1, 2), max_size=2),
    seed=st.integers(0, 2**31),
)
def test_the_way_back_is_exact(
    levels: int, sides: tuple[int, ...], channels: int, leading: list[int], seed: int
) -> None:
    grid = [n * 2**levels for n in sides]
    x = volumes(*leading, channels, *grid, seed=seed)
    haar = Haar(levels)
    y = haar.forward(x)
    assert y.shape == (*leading, channels * 8**levels, *sides)
    # each level is three sums of two and one product: a few roundings of numbers below 8
    tolerance = 8 * torch.finfo(torch.float32).eps * max(levels, 1)
    assert (haar.inverse(y) - x).abs().max() <= tolerance
    assert float(y.double().norm()) == pytest.approx(float(x.double().norm()), rel=1e-6)
    assert len(haar.bands(channels)) == y.shape[-4]


@pytest.mark.parametrize("levels", LEVELS)
def test_a_constant_lies_in_the_low_band_alone(levels: int) -> None:
    haar = Haar(levels)
    y = haar.forward(torch.full((1, 2, 8, 8, 8), 0.7))
    low = torch.tensor([band.low for band in haar.bands(2)])
    assert low.sum() == 2
    torch.testing.assert_close(y[:, low], torch.full_like(y[:, low], 0.7 * 2 ** (1.5 * levels)))
    assert y[:, ~low].abs().sum() == 0


def test_bands_of_two_levels_are_eight_coarse_ones_and_fifty_six_folded() -> None:
    bands = Haar(2).bands(1)
    assert bands[0] == Band(0, 2, (False, False, False), (0, 0, 0))
    assert [b.level for b in bands] == [2] * 8 + [1] * 56
    assert len(set(bands)) == 64
    assert bands[8:10] == (
        Band(0, 1, (False, False, True), (0, 0, 0)),
        Band(0, 1, (False, False, True), (0, 0, 1)),
    )


def test_a_channel_depends_on_its_own_volume_alone() -> None:
    x, other = volumes(1, 3, 8, 8, 8), volumes(1, 3, 8, 8, 8, seed=1)
    changed = x.clone()
    changed[:, 1] = other[:, 1]
    haar = Haar(2)
    same = (haar.forward(x) == haar.forward(changed)).flatten(2).all(2)[0]
    assert same.tolist() == [band.channel != 1 for band in haar.bands(3)]


def test_gradients_are_the_inverse_and_vmap_agrees() -> None:
    haar = Haar(2)
    x, weight = volumes(3, 2, 8, 4, 8), volumes(3, 128, 2, 1, 2, seed=1)

    def dot(a: Tensor, w: Tensor) -> Tensor:
        return (haar.forward(a) * w).sum()

    slopes = vmap(grad(dot))(x, weight)
    torch.testing.assert_close(slopes, haar.inverse(weight))
    assert torch.equal(vmap(haar.forward)(x), haar.forward(x))
    assert torch.equal(vmap(haar.inverse)(weight), haar.inverse(weight))


def test_it_stays_in_single_precision_under_autocast() -> None:
    x = volumes(1, 1, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Haar(2).forward(x)
    assert torch.equal(y, Haar(2).forward(x)) and y.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(levels=st.sampled_from(LEVELS), grid=st.tuples(*[st.integers(1, 17)] * 3))
def test_any_grid_can_be_padded_and_comes_back_bit_for_bit(
    levels: int, grid: tuple[int, int, int]
) -> None:
    haar = Haar(levels)
    side = 2**levels
    wide = haar.padded(grid)
    assert all(w % side == 0 and 0 <= w - n < side for w, n in zip(wide, grid, strict=True))
    x = volumes(2, 1, *grid)
    padded = pad_to(x, wide)
    assert padded.shape[2:] == wide
    assert torch.equal(crop_to(padded, grid), x)
    index = [torch.arange(w).clamp(max=n - 1) for w, n in zip(wide, grid, strict=True)]
    assert torch.equal(padded, x[:, :, index[0]][:, :, :, index[1]][..., index[2]])
    haar.forward(padded)


def test_white_noise_stays_white() -> None:
    """The covariance of the bands of white noise is the identity, within its sampling error."""
    n = 4000
    y = Haar(1).forward(volumes(n, 1, 2, 2, 2)).flatten(1).double()
    covariance = y.T @ y / n
    for i, j in itertools.product(range(8), repeat=2):
        error = math.sqrt((2 if i == j else 1) / n)
        assert abs(float(covariance[i, j]) - (i == j)) < 5 * error


def test_what_cannot_be_transformed_is_refused() -> None:
    with pytest.raises(UsageError, match="levels are 5"):
        Haar(5)
    with pytest.raises(UsageError, match=r"\(8, 6, 8\) does not divide by 4"):
        Haar(2).forward(torch.zeros(1, 1, 8, 6, 8))
    with pytest.raises(UsageError, match="12 channels do not divide by 8"):
        Haar(1).inverse(torch.zeros(1, 12, 2, 2, 2))
    with pytest.raises(UsageError, match="does not fit"):
        pad_to(torch.zeros(1, 1, 4, 4, 4), (4, 3, 4))
