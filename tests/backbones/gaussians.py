"""Gaussian data, for which every sampler's result is known without drawing a single sample.

The exact denoiser of N(mean, covariance) is affine, so a draw is an affine map of the noise it is
given. Fed with one unit of noise at a time, a sampler shows that map, and with it the exact mean
and covariance of its results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synthmed.backbones.diffusion import Denoiser, Process
from synthmed.backbones.samplers import Noise

Draw = Callable[[Noise], Tensor]
"""From standard normal numbers (B, d), a fresh set at each call, to samples (B, d)."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) in d dimensions, float64.

    Args:
        mean: (d,).
        covariance: (d, d), positive semidefinite.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def diagonal(cls, mean: list[float], sd: list[float]) -> Gaussian:
        """Independent coordinates with these means and standard deviations."""
        spread = torch.tensor(sd, dtype=torch.float64)
        return cls(torch.tensor(mean, dtype=torch.float64), torch.diag(spread**2))

    @property
    def sd(self) -> Tensor:
        """(d,) standard deviations of the coordinates."""
        return self.covariance.diagonal().sqrt()

    def denoiser(self, process: Process) -> Denoiser:
        """The expected data at each time of a process."""

        def denoise(x: Tensor, t: float) -> Tensor:
            return self.expected(x, *process.alpha_sigma(torch.tensor(t, dtype=torch.float64)))

        return denoise

    def expected(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x] for x (B, d), exactly."""
        variances, axes = torch.linalg.eigh(self.covariance)
        gain = alpha * variances / (alpha**2 * variances + sigma**2)
        return self.mean + (x - alpha * self.mean) @ (axes * gain @ axes.T)

    def flow(self, x: Tensor, process: Process, start: float, end: float) -> Tensor:
        """Where the probability flow takes x_start (B, d) by time `end`: Karras et al. 2022, eq. 1.

        In units of the data, the deviation from the mean shrinks as the marginal's root of
        covariance + sigma^2 does.
        """
        variances, axes = torch.linalg.eigh(self.covariance)
        times = torch.tensor([start, end], dtype=torch.float64)
        alpha, sigma = process.alpha_sigma(times)
        first, last = (sigma / alpha) ** 2
        shrink = ((variances + last) / (variances + first)).sqrt()
        deviation = (x / alpha[0] - self.mean) @ (axes * shrink @ axes.T)
        return alpha[1] * (self.mean + deviation)

    def wasserstein(self, mean: Tensor, covariance: Tensor) -> float:
        """2-Wasserstein distance to N(mean, covariance): Dowson and Landau 1982."""
        root = _root(self.covariance)
        cross = _root(root @ covariance @ root)
        bures = (self.covariance + covariance - 2 * cross).trace().clamp(min=0)
        return float((((mean - self.mean) ** 2).sum() + bures).sqrt())


def moments(draw: Draw, dimensions: int) -> tuple[Tensor, Tensor]:
    """Exact mean (d,) and covariance (d, d) of an affine `draw`'s results."""
    calls = 0

    def silent() -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(1, dimensions, dtype=torch.float64)

    mean = draw(silent)[0]
    turns = iter(range(calls))

    def unit() -> Tensor:
        noise = torch.zeros(calls, dimensions, dimensions, dtype=torch.float64)
        noise[next(turns)] = torch.eye(dimensions)
        return noise.flatten(0, 1)

    columns = draw(unit) - mean
    return mean, columns.T @ columns


def _root(a: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(a)
    return axes * values.clamp(min=0).sqrt() @ axes.T
