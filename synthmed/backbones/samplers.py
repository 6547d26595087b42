"""Samplers: from noise to data with a denoiser, in as few evaluations as the method allows.

All of them start from x ~ N(0, I), walk down a grid of times that ends at t = 0, and from there
take the last step to the noise-free end, whose result is the denoiser's estimate itself. The grid
need not be whole times, and may be as fine as one likes. Data are expected about 0, at a scale of
about 1: the start has lost them but for a 160th part.

In the comments a step goes from t to s < t; SNR = alpha^2 / sigma^2; D is the denoised estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from synthmed.backbones.diffusion import Denoiser, Process

Noise = Callable[[], Tensor]
"""Fresh standard normal numbers (B, ...) at every call; row i from sample i's own generator."""

Spacing = Literal["time", "log_snr", "karras"]
"""Where the n times lie: evenly in t from T - 1 to 0 (Nichol and Dhariwal 2021, section 4), evenly
in log SNR (Lu et al. 2022), or by Karras et al. 2022, eq. 5, with rho = 7. The latter two start at
sigma / alpha = 160 at most: the cosine schedule goes on to 20 000, where data no longer show."""

Steps = Annotated[int, Field(ge=1, le=10_000)]
_RHO = 7.0
_SIGMA_MAX = 160.0  # the linear schedule of 1000 steps ends at 157


class Ancestral(BaseModel):
    """The reverse chain of Ho et al. 2020, with the posterior that belongs to the stride.

    A step draws from q(x_s | x_t), given that E[x_0 | x_t] = D: for s = t - 1 and `data_sd` 0 or 1
    it is their eq. 11 with the lower or the upper of the two variances in their section 3.2.

    Args:
        steps: n, evaluations of the denoiser; T of them at spacing `time` is the original chain.
        spacing: of the times.
        data_sd: how uncertain D is taken to be: as it were for data N(., data_sd^2 I), for which
            any number of steps is then exact up to the last one's sigma.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["ancestral"] = "ancestral"
    steps: Steps = 1000
    spacing: Spacing = "time"
    data_sd: Annotated[float, Field(ge=0)] = 0.0

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser in one draw."""
        return self.steps

    def draw(self, denoise: Denoiser, process: Process, noise: Noise) -> Tensor:
        """Samples (B, ...) of the data; `noise` is called `steps` times."""
        x = noise()
        levels = _levels(process, self.steps, self.spacing)
        for t, s in pairwise(levels):
            clean = denoise(x, t.time)
            # SNR_t / SNR_s, 0 for the last step; 1 - kept is the variance that x_t has gained
            # over x_s, as a share of sigma_t^2 (Kingma et al. 2021, arXiv:2107.00630, appendix A)
            kept = math.exp(t.log_snr - s.log_snr)
            weight = s.alpha * (1 - kept)
            x = kept * s.alpha / t.alpha * x + weight * clean
            if s.sigma:
                # of q(x_s | x_t, x_0), and of x_0 about D: Bao et al. 2022 (arXiv:2201.06503)
                posterior = s.sigma**2 * (1 - kept)
                marginal = (t.alpha * self.data_sd) ** 2 + t.sigma**2
                uncertain = (self.data_sd * t.sigma) ** 2 / marginal
                x = x + math.sqrt(posterior + weight**2 * uncertain) * noise()
        return x


class DDIM(BaseModel):
    """Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16: first order, deterministic at eta 0.

    Args:
        steps: n, evaluations of the denoiser.
        spacing: of the times.
        eta: 0 follows the flow; 1 is the ancestral chain with posterior variance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["ddim"] = "ddim"
    steps: Steps = 50
    spacing: Spacing = "time"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser in one draw."""
        return self.steps

    def draw(self, denoise: Denoiser, process: Process, noise: Noise) -> Tensor:
        """Samples (B, ...) of the data; `noise` is called once at eta 0, else `steps` times."""
        x = noise()
        levels = _levels(process, self.steps, self.spacing)
        for t, s in pairwise(levels):
            clean = denoise(x, t.time)
            eps = (x - t.alpha * clean) / t.sigma
            # share of sigma_s^2 that is drawn anew: 1 - SNR_t / SNR_s at eta 1
            fresh = self.eta**2 * (1 - math.exp(t.log_snr - s.log_snr))
            x = s.alpha * clean + s.sigma * math.sqrt(1 - fresh) * eps
            if self.eta and s.sigma:
                x = x + s.sigma * math.sqrt(fresh) * noise()
        return x


class DPMSolver(BaseModel):
    """DPM-Solver++(2M) of Lu et al. 2022 (arXiv:2211.01095), algorithm 2: second order, multistep.

    Args:
        steps: n, evaluations of the denoiser.
        spacing: of the times.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["dpm_solver"] = "dpm_solver"
    steps: Steps = 20
    spacing: Spacing = "log_snr"

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser in one draw."""
        return self.steps

    def draw(self, denoise: Denoiser, process: Process, noise: Noise) -> Tensor:
        """Samples (B, ...) of the data; `noise` is called once."""
        x = noise()
        previous, last_h = None, math.inf  # of the step before; h is half the rise of log SNR
        levels = _levels(process, self.steps, self.spacing)
        for t, s in pairwise(levels):
            clean = denoise(x, t.time)
            h = (s.log_snr - t.log_snr) / 2
            # the step to the noise-free end, h = inf, has no second order: D alone is right there
            if previous is None or not s.sigma:
                guess = clean
            else:
                guess = clean + h / (2 * last_h) * (clean - previous)
            x = s.sigma / t.sigma * x - s.alpha * math.expm1(-h) * guess
            previous, last_h = clean, h
        return x


class Heun(BaseModel):
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 1, and algorithm 2 where `churn` is set.

    Second order; a step but the last takes two evaluations. A step to a third of sigma / alpha or
    less overshoots, by a tenth and more: take 13 steps at least, and not those even in `time`.

    Args:
        steps: n, so that the denoiser is evaluated 2 n - 1 times.
        spacing: of the times.
        churn: S_churn, noise put back over all steps; 0 follows the flow.
        churn_min: S_tmin, smallest sigma / alpha at which it is put back.
        churn_max: S_tmax, largest one.
        churn_noise: S_noise, its standard deviation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["heun"] = "heun"
    steps: Steps = 18
    spacing: Spacing = "karras"
    churn: Annotated[float, Field(ge=0)] = 0.0
    churn_min: Annotated[float, Field(ge=0)] = 0.05
    churn_max: Annotated[float, Field(gt=0)] = 50.0
    churn_noise: Annotated[float, Field(gt=0)] = 1.0

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser in one draw."""
        return 2 * self.steps - 1

    def draw(self, denoise: Denoiser, process: Process, noise: Noise) -> Tensor:
        """Samples (B, ...) of the data; `noise` is called once, and for each churned step."""
        levels = _levels(process, self.steps, self.spacing)
        most = levels[0].sigma / levels[0].alpha
        # here x is x_t / alpha_t, the data plus noise of level sigma
        x = noise() / levels[0].alpha
        for t, s in pairwise(levels):
            sigma, to = t.sigma / t.alpha, s.sigma / s.alpha
            time = t.time
            if self.churn and self.churn_min <= sigma <= self.churn_max:
                gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
                raised = min(sigma * (1 + gamma), most)  # the process knows no noisier data
                x = x + math.sqrt(raised**2 - sigma**2) * self.churn_noise * noise()
                sigma = raised
                time = float(process.time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
            clean = denoise(x / math.hypot(1, sigma), time)
            slope = (x - clean) / sigma
            if not s.sigma:
                x = clean  # algorithm 1, line 6: Euler's step alone
                break
            ahead = x + (to - sigma) * slope
            slope_ahead = (ahead - denoise(ahead * s.alpha, s.time)) / to
            x = x + (to - sigma) * 0.5 * (slope + slope_ahead)
        return x


Sampler = Annotated[Ancestral | DDIM | DPMSolver | Heun, Field(discriminator="name")]


class _Level(NamedTuple):
    time: float
    alpha: float
    sigma: float
    log_snr: float


def _levels(process: Process, steps: int, spacing: Spacing) -> list[_Level]:
    """`steps` levels from the start to t = 0, then the noise-free end."""
    ends = torch.tensor([process.steps - 1.0, 0.0], dtype=torch.float64)
    if spacing != "time":
        ends[0] = process.time_of_sigma(process.sigma_edm(ends[0]).clamp(max=_SIGMA_MAX))
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "time":
        times = ends[0] * (1 - share)
    elif spacing == "log_snr":
        first, last = process.log_snr(ends)
        times = process.time(first + share * (last - first))
    else:
        first, last = process.sigma_edm(ends) ** (1 / _RHO)
        times = process.time_of_sigma((first + share * (last - first)) ** _RHO)
    # exact at both ends, whatever the inverse has rounded; a single step is the start
    times[-1], times[0] = ends[1], ends[0]
    alpha, sigma = process.alpha_sigma(times)
    columns = (a.tolist() for a in (times, alpha, sigma, process.log_snr(times)))
    levels = [_Level(*row) for row in zip(*columns, strict=True)]
    return [*levels, _Level(-1.0, 1.0, 0.0, math.inf)]
