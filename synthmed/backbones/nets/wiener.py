"""The best linear denoiser of a cohort: where a diffusion network may start from.

For data N(mean, A A^T + diag(v)) the expected clean volume given a noisy one is known in closed
form (the Wiener filter). A network that only learns what this leaves starts with the cohort's mean
shape, its main modes and the texture's variance, and spends its steps on what is not Gaussian:
Karras et al. 2022 (arXiv:2206.00364, section 5) with a full covariance in place of one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from synthmed.backbones.nets.gaussian import CohortGaussian

_LEVELS = 64  # values that v is rounded to: sums over all n numbers become sums over 64
_FLOOR = 1e-3  # smallest deviation, so that a number that never varies does not divide by 0
# people: with fewer the denoiser has patients by heart, and leaves nothing to learn
_PER_FACTOR = 3


class Filtered(NamedTuple):
    """What the linear denoiser says of noisy data (B, n).

    Args:
        clean: its estimate.
        unit: deviation of what it cannot know; of the factors' part their variances alone.
        seen: the noisy data, centred, in units of its deviation.
        guess: the estimate, centred, in units of the data's deviation.
        weight: unit^2 over its mean: squared errors in units of `unit` then count as they do in
            the data, and alike at every noise level.
    """

    clean: Tensor
    unit: Tensor
    seen: Tensor
    guess: Tensor
    weight: Tensor


class Wiener(CohortGaussian):
    """N(mean + c W, A A^T + diag(v)) over n numbers, in buffers; N(0, I) until `fit`.

    Args:
        n: numbers of a volume.
        factors: most columns of A beside those of labels; at most a third as many as people.
        condition_width: D.
        label_widths: how many of the D each label has; empty where they are one label's.
    """

    variance_n: Tensor
    levels_q: Tensor
    inner_qkk: Tensor

    def __init__(
        self, n: int, factors: int, condition_width: int, label_widths: Sequence[int] = ()
    ) -> None:
        super().__init__(n, factors, condition_width, label_widths, _PER_FACTOR)
        self.register_buffer("variance_n", torch.ones(n))
        self.register_buffer("levels_q", torch.ones(_LEVELS))
        self.register_buffer("inner_qkk", torch.zeros(_LEVELS, self.columns, self.columns))

    @torch.no_grad()
    def fit(self, y: Tensor, c: Tensor, weight: Tensor | None = None) -> float:
        """As that of `CohortGaussian`; what labels and factors leave of the variance is v."""
        left, explained = self._match(y, c, weight)
        log = left.clamp(min=_FLOOR**2).log()
        levels = torch.linspace(float(log.min()), float(log.max()), _LEVELS, device=y.device)
        step = max(float(levels[1] - levels[0]), 1e-12)
        which = ((log - levels[0]) / step).round().long().clamp(0, _LEVELS - 1)
        self.levels_q.copy_(levels.exp())
        self.variance_n.copy_(self.levels_q[which])
        for q in range(_LEVELS):
            rows = self.factor_nk[which == q]
            self.inner_qkk[q] = rows.T @ rows
        return explained

    def forward(self, y: Tensor, sigma: Tensor, c: Tensor) -> Filtered:
        """Denoise y = clean + sigma N(0, I).

        Args:
            y: (B, n).
            sigma: (B,).
            c: (B, D).
        """
        s2 = sigma.float()[:, None] ** 2
        mean = self.centred(c)
        r = y - mean
        noise = self.variance_n + s2
        # columns of labels that are known are out
        on = self.drawn_along(c)
        # Woodbury: (A A^T + N)^-1 r = N^-1 r - N^-1 A (I + A^T N^-1 A)^-1 A^T N^-1 r
        inner = torch.einsum("bq,qkl->bkl", 1 / (self.levels_q + s2), self.inner_qkk)
        inner = inner * on[:, :, None] * on[:, None]
        eye = torch.eye(inner.shape[-1], device=y.device)
        seen = ((r / noise) @ self.factor_nk * on)[..., None]
        solved = torch.linalg.solve(inner + eye, torch.cat([seen, eye.expand_as(inner)], -1))
        z, doubt = solved[..., 0], solved[..., 1:].diagonal(dim1=-2, dim2=-1) * on
        # y - s2 times that, without the difference of two large numbers where s2 is large
        clean = mean + (self.variance_n * r + s2 * (z @ self.factor_nk.T)) / noise
        square = self.factor_nk.square().T
        all_variance = self.variance_n + on @ square
        # the covariance given y is diag(v s2 / N) + (s2 / N) A (I + A^T N^-1 A)^-1 A^T (s2 / N)
        left = (doubt @ square) * (s2 / noise) ** 2
        left = left + self.variance_n * s2 / noise
        return Filtered(
            clean=clean,
            unit=left.sqrt(),
            seen=r / (all_variance + s2).sqrt(),
            guess=(clean - mean) / all_variance.sqrt(),
            weight=left / left.mean(1, keepdim=True),
        )
