"""The observation noise of a decoder: stationary up to a scale map, with a learned spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Adam moves every parameter by about the learning rate a step, whatever its unit; these gains let
# scale maps and spectra cover their range (several e-folds) within a few hundred steps.
_GAIN = 10.0
# what a density has beside what is drawn, a standard deviation in prepared intensity: where no scan
# shows anything, a density needs some and a sample must have none
_FLOOR = 1e-3
_LEAST = 1e-6
_FAINTEST = 1e-6  # of a spectrum's mean, so that its logarithm is finite


class SpectralNoise(nn.Module):
    """Gaussian p(x | mean) with covariance  diag(s) F* diag(S) F diag(s).

    s is a map of standard deviations (one a voxel and channel), F the orthonormal 3D Fourier
    transform and S a spectrum that depends on the spatial frequency's length alone, with mean 1.
    S = 1 is the independent noise of an ordinary VAE; a learned S gives the residual the texture
    it has in the data, so that a sample is as sharp as a scan instead of a smooth mean plus grain.

    The density is exact: log det = sum log s + 1/2 sum log S, by one FFT a volume. Its s has
    a floor of 0.001 beside what is drawn, as independent variance has.

    Args:
        channels: C.
        grid: (X, Y, Z).
        n_knots: knots of log S between frequency 0 and the corner of the spectrum, linear between.
        spectral: False keeps S = 1 (independent noise).
        masks: how many channels, the last ones, are masks: a mask is drawn at its mean, since noise
            of its own would speckle it.
    """

    weight_R: Tensor
    basis_KXYR: Tensor
    drawn_C: Tensor

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int, int],
        n_knots: int = 16,
        spectral: bool = True,
        masks: int = 0,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.spectral = spectral
        self.log_scale = nn.Parameter(torch.full((channels, *grid), math.log(0.2) / _GAIN))
        self.log_sigma = nn.Parameter(torch.full((channels,), math.log(0.2) / _GAIN))
        self.log_spectrum = nn.Parameter(torch.zeros(channels, n_knots), requires_grad=spectral)
        fx, fy = (torch.fft.fftfreq(n) for n in grid[:2])
        fz = torch.fft.rfftfreq(grid[2])
        length = (fx[:, None, None] ** 2 + fy[:, None] ** 2 + fz**2).sqrt()
        position = length / math.sqrt(0.75) * (n_knots - 1)
        # hat functions; a product with them is reproducible where a gather's gradient is not
        knots = torch.arange(n_knots)[:, None, None, None]
        basis = (1 - (position - knots).abs()).clamp(min=0)
        # a half spectrum holds every frequency once or twice: both ends of the last axis once
        twice = torch.full((len(fz),), 2.0)
        twice[0] = 1
        if grid[2] % 2 == 0:
            twice[-1] = 1
        self.register_buffer("weight_R", twice, persistent=False)
        self.register_buffer("basis_KXYR", basis, persistent=False)
        drawn = torch.arange(channels) < channels - masks
        self.register_buffer("drawn_C", drawn.float(), persistent=False)

    def _log_spectrum(self) -> Tensor:
        """log S on the half spectrum (C, X, Y, R), normalised so that S has mean 1."""
        log_s = torch.einsum("ck,kxyr->cxyr", self.log_spectrum * _GAIN, self.basis_KXYR)
        total = math.prod(self.grid)
        mean = torch.logsumexp(log_s + self.weight_R.log(), dim=(1, 2, 3), keepdim=True) - math.log(
            total
        )
        return log_s - mean

    def scale(self) -> Tensor:
        """The map of the density's standard deviations, (C, X, Y, Z)."""
        return ((self.log_scale * 2 * _GAIN).exp() + _FLOOR**2).sqrt()

    @torch.no_grad()
    def measure(self, residuals: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Set deviations and spectrum to those of the residuals that training has left.

        Steps learn them together, and one makes up for what the other has not reached yet; where
        the deviation is too large the spectrum becomes uneven to lower its determinant.

        Args:
            residuals: at each of two calls all of them, in parts: weights (n,) that count people,
                and (n, C, X, Y, Z).
        """
        square, people = torch.zeros_like(self.log_scale), 0.0
        for weight, residual in residuals():
            square += torch.einsum("n,ncxyz->cxyz", weight, residual.square())
            people += float(weight.sum())
        sd = (square / people).sqrt()
        self.set_scale(sd)
        if not self.spectral:
            return
        # where next to nothing is drawn, a residual in units of it is rounding
        unit = torch.where(sd > _FLOOR, 1 / sd.clamp(min=_FLOOR), torch.zeros_like(sd))
        power = torch.zeros_like(self.basis_KXYR[0])[None].repeat(len(sd), 1, 1, 1)
        for weight, residual in residuals():
            spectrum = torch.fft.rfftn(residual * unit, dim=(-3, -2, -1), norm="ortho")
            squared = spectrum.real**2 + spectrum.imag**2
            power += torch.einsum("n,ncxyr->cxyr", weight, squared)
        hats = self.basis_KXYR * self.weight_R
        seen = torch.einsum("cxyr,kxyr->ck", power, hats) / hats.sum((1, 2, 3)).clamp(min=1e-12)
        mean = seen.mean(1, keepdim=True)
        relative = torch.where(mean > 0, seen / mean.clamp(min=1e-30), torch.ones_like(seen))
        self.log_spectrum.copy_(relative.clamp(min=_FAINTEST).log() / _GAIN)

    @torch.no_grad()
    def set_scale(self, sd: Tensor) -> None:
        """Set the map of drawn standard deviations (C, X, Y, Z) to what was measured."""
        self.log_scale.copy_(sd.clamp(min=_LEAST).log() / _GAIN)

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Both negative log densities of residuals, in nats: (B,) for the mean, (B,) for the fit.

        The first, under one deviation a channel, teaches the mean. The second, under the full
        covariance, sees the residual as given and fits the covariance to it. Were it to teach
        the mean as well, voxels that are hard to predict would be given up early: their deviation
        grows, and with it their gradient vanishes (Seitzer et al. 2022, arXiv:2203.09168).
        """
        r = residual.float()
        sigma = (self.log_sigma * _GAIN).exp()[:, None, None, None] + _FLOOR
        plain = ((r / sigma) ** 2 / 2 + sigma.log()).sum((1, 2, 3, 4))
        constant = 0.5 * residual[0].numel() * math.log(2 * math.pi)
        return plain + constant, self.full(r.detach())

    def full(self, residual: Tensor) -> Tensor:
        """Negative log density under the full covariance, in nats.

        Args:
            residual: (B, C, X, Y, Z), data minus mean.

        Returns:
            (B,).
        """
        scale = self.scale()
        log_s = self._log_spectrum()
        spectrum = torch.fft.rfftn(residual.float() / scale, dim=(-3, -2, -1), norm="ortho")
        power = spectrum.real**2 + spectrum.imag**2
        quadratic = (power * (-log_s).exp() * self.weight_R).sum((1, 2, 3, 4))
        log_det = (log_s * self.weight_R).sum() + 2 * scale.log().sum()
        total: Tensor = quadratic + log_det + residual[0].numel() * math.log(2 * math.pi)
        return 0.5 * total

    def sample(self, white: Tensor) -> Tensor:
        """Residuals (B, C, X, Y, Z) from standard normal numbers of that shape, without the floor:
        where a scan never has any, a sample has none."""
        spectrum = torch.fft.rfftn(white, dim=(-3, -2, -1), norm="ortho")
        coloured = spectrum * (0.5 * self._log_spectrum()).exp()
        residual: Tensor = torch.fft.irfftn(coloured, s=self.grid, norm="ortho")
        residual = residual * (self.log_scale * _GAIN).exp()
        return residual * self.drawn_C[:, None, None, None]
