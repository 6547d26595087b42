"""The Gaussian diffusion process: schedules, noising, and what a network may predict.

    x_t = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I),   alpha_t^2 + sigma_t^2 = 1

Ho et al. 2020 (arXiv:2006.11239), eq. 4, with alpha_t^2 = bar alpha_t. Times t = 0 ... T - 1 are
theirs less one; the data itself lies before t = 0. Between whole times log SNR = log(alpha^2 /
sigma^2) is linear in t, so that fast samplers and training may use any t in [0, T - 1]. The
noise level of Karras et al. 2022 is sigma_t / alpha_t, here `sigma_edm`.

Tables and coefficients are float64: near both ends 1 - alpha^2 or 1 - sigma^2 is lost in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from synthmed.errors import UsageError

Schedule = Literal["linear", "cosine"]
"""`linear` of Ho et al. 2020, section 4; `cosine` of Nichol and Dhariwal 2021, eq. 17."""

Prediction = Literal["epsilon", "sample", "v"]
"""What a network puts out: the noise, the clean data, or alpha eps - sigma x_0."""

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t (B, ...), t in [0, T - 1]) to the expected clean data (B, ...). x_t has the scale of the
equation above; conditions and guidance are inside."""


class _Tables(NamedTuple):
    betas: Tensor
    alpha_bars: Tensor
    log_snr: Tensor


@dataclass(frozen=True)
class Process:
    """A schedule of noise over T steps, at whole times and between them.

    Methods take times as a tensor of any shape and give float64 of that shape on its device; times
    outside [0, T - 1] count as the nearer end. `diffuse`, `target` and `estimates` take t of
    shape (), or (B,) for the first axis of their data, and keep the data's dtype.

    Args:
        schedule: linear or cosine.
        steps: T, at least 2.

    >>> process = Process("cosine", 1000)
    >>> t = torch.tensor([0.0, 500.0, 999.0])
    >>> [f"{s:.4g}" for s in process.sigma_edm(t).tolist()]
    ['0.006425', '1.016', '2.029e+04']
    """

    schedule: Schedule = "cosine"
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"a diffusion of {self.steps} steps", "Give it at least 2.")

    @property
    def betas(self) -> Tensor:
        """(T,) variances of the single steps."""
        return self._tables("cpu").betas

    @property
    def alpha_bars(self) -> Tensor:
        """(T,) alpha_t^2."""
        return self._tables("cpu").alpha_bars

    def log_snr(self, t: Tensor) -> Tensor:
        """Log of alpha^2 / sigma^2, strictly falling in t."""
        table = self._tables(str(t.device)).log_snr
        t = t.double().clamp(0, self.steps - 1)
        whole = t.floor().clamp(max=self.steps - 2)
        below, share = whole.long(), t - whole
        return _at(table, below) * (1 - share) + _at(table, below + 1) * share

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise of x_t; their squares sum to 1."""
        log_snr = self.log_snr(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def sigma_edm(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise in units of the data (Karras et al. 2022)."""
        return (-0.5 * self.log_snr(t)).exp()

    def time(self, log_snr: Tensor) -> Tensor:
        """The t in [0, T - 1] with this log SNR; the nearer end where there is none."""
        table = self._tables(str(log_snr.device)).log_snr
        wanted = log_snr.double().clamp(table[-1], table[0])
        # the table falls; searchsorted wants it rising
        above = torch.searchsorted(-table, -wanted).clamp(1, self.steps - 1)
        left, right = _at(table, above - 1), _at(table, above)
        return above - 1 + (left - wanted) / (left - right)

    def time_of_sigma(self, sigma_edm: Tensor) -> Tensor:
        """The t in [0, T - 1] with this sigma / alpha (> 0)."""
        return self.time(-2 * sigma_edm.double().log())

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from data and noise (B, ...): Ho et al. 2020, eq. 4."""
        alpha, sigma = self._beside(x0, t)
        return alpha * x0 + sigma * eps

    def target(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a network of this kind should put out, (B, ...)."""
        if prediction == "epsilon":
            return eps
        if prediction == "sample":
            return x0
        alpha, sigma = self._beside(x0, t)
        return alpha * eps - sigma * x0  # Salimans and Ho 2022 (arXiv:2202.00512), appendix D

    def estimates(
        self, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Clean data and noise (x0_hat, eps_hat), each (B, ...), from a network's output.

        They always satisfy x_t = alpha x0_hat + sigma eps_hat. An error of the output grows by
        1/alpha in x0_hat under `epsilon` (157 at the end of the linear schedule of 1000 steps,
        20 000 of the cosine) and by 1/sigma in eps_hat under `sample` (100 and 156 at its start);
        under `v` it never grows.

        Args:
            prediction: what the output is.
            output: (B, ...) of the network.
            x_t: (B, ...), what the network saw.
            t: () or (B,).
        """
        alpha, sigma = self._beside(x_t, t)
        if prediction == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if prediction == "sample":
            return output, (x_t - alpha * output) / sigma
        # a rotation by the angle whose cosine is alpha: the same appendix
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output

    def _beside(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma in x's dtype, with axes to multiply x by."""
        alpha, sigma = self.alpha_sigma(t.to(x.device))
        shape = t.shape + (1,) * (x.ndim - t.ndim)
        return alpha.to(x.dtype).reshape(shape), sigma.to(x.dtype).reshape(shape)

    def _tables(self, device: str) -> _Tables:
        return _tables(self.schedule, self.steps, device)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table; with an axis more, as vmap cannot index by a single number."""
    return table[index.unsqueeze(-1)].squeeze(-1)


@lru_cache(maxsize=64)
def _tables(schedule: Schedule, steps: int, device: str) -> _Tables:
    if schedule == "linear":
        # Ho et al. 2020, section 4, for T = 1000; for another T scaled so that the whole process,
        # the sum of the betas, stays as it is
        betas = np.minimum(np.linspace(1e-4, 0.02, steps) * 1000 / steps, 0.999)
    else:
        betas = _cosine(steps)
    log_alpha_bar = np.log1p(-betas).cumsum()
    log_snr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
    # a table first asked for in inference mode could not be used in training later
    with torch.inference_mode(False):
        tables = (torch.from_numpy(a).to(device) for a in (betas, np.exp(log_alpha_bar), log_snr))
        return _Tables(*tables)


def _cosine(steps: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """beta_t = 1 - bar alpha_t / bar alpha_(t-1), at most 0.999: Nichol and Dhariwal 2021."""
    s = 0.008
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * math.pi / 2) ** 2  # eq. 17
    betas: np.ndarray[tuple[int], np.dtype[np.float64]] = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return betas
