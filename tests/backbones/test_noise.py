"""The decoder's observation noise against the dense Gaussian that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from synthmed.backbones.nets.noise import _FLOOR, SpectralNoise

GRID = (3, 4, 5)  # odd and even sides: the half spectrum counts both ends of its last axis once
N = math.prod(GRID)


def noise(seed: int = 0, channels: int = 1, masks: int = 0) -> SpectralNoise:
    """Noise with a scale map and a spectrum that are not flat."""
    made = SpectralNoise(channels, GRID, masks=masks)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.log_scale.add_(0.03 * torch.randn(made.log_scale.shape, generator=g))
        made.log_spectrum.add_(0.1 * torch.randn(made.log_spectrum.shape, generator=g))
    return made.double()


@torch.no_grad()
def covariance(made: SpectralNoise) -> Tensor:
    """(N, N), read off the sampler: a linear map of white noise."""
    columns = made.sample(torch.eye(N, dtype=torch.float64).reshape(N, 1, *GRID)).reshape(N, N)
    return columns.T @ columns


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_the_density_is_that_of_what_is_drawn_and_its_floor(seed: int) -> None:
    made = noise(seed)
    drawn = covariance(made)
    wider = (1 + _FLOOR**2 / drawn.diagonal()).sqrt()
    dense = torch.distributions.MultivariateNormal(
        torch.zeros(N, dtype=torch.float64), wider[:, None] * drawn * wider
    )
    x = torch.randn(6, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = made.full(x.reshape(6, 1, *GRID))
    # the residual passes through float32
    torch.testing.assert_close(found, -dense.log_prob(x), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_scale_map_is_the_deviation_of_what_is_drawn() -> None:
    """The spectrum has mean 1, so that it colours the noise and does not change its strength."""
    made = noise(1)
    variance = covariance(made).diagonal().reshape(1, *GRID)
    torch.testing.assert_close((variance + _FLOOR**2).sqrt(), made.scale(), rtol=1e-9, atol=0)


@torch.no_grad()
def test_where_no_deviation_was_measured_nothing_is_drawn_and_the_density_is_finite() -> None:
    made = noise(1)
    measured = torch.full((1, *GRID), 0.3, dtype=torch.float64)
    measured[:, 0] = 0
    made.set_scale(measured)
    deviation = covariance(made).diagonal().sqrt().reshape(1, *GRID)
    torch.testing.assert_close(deviation, measured, rtol=1e-9, atol=2e-6)
    assert made.scale().min() == pytest.approx(_FLOOR, rel=1e-3)
    assert torch.isfinite(made.full(torch.zeros(1, 1, *GRID))).all()


@torch.no_grad()
def test_masks_are_drawn_at_their_mean() -> None:
    white = torch.randn(
        2, 3, *GRID, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    drawn, plain = noise(2, 3, masks=2).sample(white), noise(2, 3).sample(white)
    assert torch.equal(drawn[:, :1], plain[:, :1])
    assert not drawn[:, 1:].any()
    assert plain[:, 1:].any()


def parts(residual: Tensor) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """All residuals in two parts, those of a person with two scans half as heavy."""
    weight = torch.ones(len(residual))
    weight[:2] = 0.5
    cut = len(residual) // 3
    return lambda: [(weight[:cut], residual[:cut]), (weight[cut:], residual[cut:])]


@torch.no_grad()
def test_what_is_measured_is_what_residuals_were_drawn_from() -> None:
    """Deviations that differ by place and a spectrum that falls by e^4 in one channel, rises in the
    other; a wiggle from knot to knot would be smoothed."""
    grid = (10, 12, 8)
    g = torch.Generator().manual_seed(0)
    truth = SpectralNoise(2, grid)
    truth.log_scale.add_(0.03 * torch.randn(2, *grid, generator=g))
    slope = torch.linspace(0.2, -0.2, truth.log_spectrum.shape[1])
    truth.log_spectrum.copy_(torch.stack([slope, -slope]))
    white = torch.randn(2000, 2, *grid, generator=g)
    made = SpectralNoise(2, grid)
    made.measure(parts(truth.sample(white)))
    torch.testing.assert_close(made.scale(), truth.scale(), rtol=0.08, atol=0)
    torch.testing.assert_close(made._log_spectrum(), truth._log_spectrum(), rtol=0, atol=0.15)
    plain = SpectralNoise(2, grid, spectral=False)
    plain.measure(parts(truth.sample(white)))
    assert not plain.log_spectrum.any()


@torch.no_grad()
def test_black_background_does_not_colour_what_is_measured() -> None:
    """White residuals in a corner of the grid, whatever steps had made of deviation and spectrum:
    their neighbours stay independent, and a whole volume is no brighter or darker for them."""
    grid = (14, 16, 14)
    made = SpectralNoise(1, grid)
    made.log_spectrum[0, 0], made.log_spectrum[0, -1] = 0.4, -0.5
    g = torch.Generator().manual_seed(0)
    residual = torch.zeros(100, 1, *grid)
    residual[:, :, :8, :8, :10] = 0.05 * torch.randn(100, 1, 8, 8, 10, generator=g)
    made.measure(lambda: [(torch.ones(100), residual)])
    drawn = made.sample(torch.randn(200, 1, *grid, generator=g))
    lit = drawn[:, :, :8, :8, :10]
    assert drawn.abs().sum() - lit.abs().sum() < 1e-3 * lit.abs().sum()
    assert float(lit.std()) == pytest.approx(0.05, rel=0.03)
    beside = (lit[:, :, 1:] * lit[:, :, :-1]).mean() / lit.square().mean()
    assert abs(float(beside)) < 0.02
    wobble = lit.flatten(1).mean(1).var() / lit.square().mean() * lit[0].numel()
    assert float(wobble) == pytest.approx(1, abs=0.5)


@torch.no_grad()
def test_of_no_residual_nothing_is_drawn() -> None:
    made = SpectralNoise(1, GRID)
    made.measure(lambda: [(torch.ones(3), torch.zeros(3, 1, *GRID))])
    assert made.sample(torch.randn(2, 1, *GRID)).abs().max() < 1e-4
    assert all(torch.isfinite(p).all() for p in made.parameters())
