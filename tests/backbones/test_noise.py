"""The decoder's observation noise against the dense Gaussian that it stands for."""

from __future__ import annotations

import math

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
