"""The best linear denoiser of a cohort: where a diffusion network may start from.

For data N(mean, A A^T + diag(v)) the expected clean volume given a noisy one is known in closed
form (the Wiener filter). A network that only learns what this leaves starts with the cohort's mean
shape, its main modes and the texture's variance, and spends its steps on what is not Gaussian:
Karras et al. 2022 (arXiv:2206.00364, section 5) with a full covariance in place of one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from synthmed.backbones.generative import known

_LEVELS = 64  # values that v is rounded to: sums over all n numbers become sums over 64
_FLOOR = 1e-3  # smallest deviation, so that a number that never varies does not divide by 0
_PSEUDO = 5.0  # patients' worth of doubt in what a condition shifts
_COLUMNS = 2**16  # numbers of a volume that are held in float64 at once


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


class Wiener(nn.Module):
    """N(mean + c W, A A^T + diag(v)) over n numbers, in buffers; N(0, I) until `fit`.

    What a label shifts is part of the covariance where the label is not known: A then has further
    columns, W^T times a root of that label's own covariance.

    Args:
        n: numbers of a volume.
        factors: most columns of A beside those of labels.
        condition_width: D.
        label_widths: how many of the D each label has; empty where they are one label's.
    """

    mean_n: Tensor
    weight_Dn: Tensor
    centre_D: Tensor
    factor_nk: Tensor
    variance_n: Tensor
    levels_q: Tensor
    inner_qkk: Tensor

    def __init__(
        self, n: int, factors: int, condition_width: int, label_widths: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.label_widths = tuple(label_widths)
        self.factors = factors
        columns = factors + condition_width
        self.register_buffer("mean_n", torch.zeros(n))
        self.register_buffer("weight_Dn", torch.zeros(condition_width, n))
        self.register_buffer("centre_D", torch.zeros(condition_width))
        self.register_buffer("factor_nk", torch.zeros(n, columns))
        self.register_buffer("variance_n", torch.ones(n))
        self.register_buffer("levels_q", torch.ones(_LEVELS))
        self.register_buffer("inner_qkk", torch.zeros(_LEVELS, columns, columns))

    @torch.no_grad()
    def fit(self, y: Tensor, c: Tensor, weight: Tensor | None = None) -> float:
        """Match mean and covariance; at most a third as many factors as people are used.

        Args:
            y: (m, n) volumes. They are spent: cohorts are large, and what is left of them after
                the fit is written over them.
            c: (m, D) encoded conditions; a label that somebody lacks shifts nothing for them.
            weight: (m,) how much each counts, in people: those of a person add up to 1. Null
                where every volume is a person of its own.

        Returns:
            Share of the variance in condition and factors, not in v.
        """
        each = y.new_ones(len(y), 1) if weight is None else weight[:, None].to(y)
        m = people = round(float(each.sum()))
        told = known(c, self.label_widths)
        mean = (each.T @ y)[0] / m
        centre = (each * c).sum(0) / (each * told).sum(0).clamp(min=1)
        # scaled by the root of its weight, each counts as often as it should in every square
        root = each.sqrt()
        x = (root * torch.where(told, c - centre, 0)).double()
        rest = y.sub_(mean).mul_(root)
        total = float(rest.square().sum())
        ridge = _PSEUDO * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        shown = torch.cat([x.T @ part.double() for part in torch.split(rest, _COLUMNS, 1)], 1)
        shift = torch.linalg.solve(x.T @ x + ridge, shown).float()
        rest -= x.float() @ shift
        # of somebody without a label its shift is still there: they would count it as texture
        whole = told.all(1)
        n = float(each[whole].sum())
        if m / 2 <= n < m:
            rest, m = rest[whole], round(n)
        # the left singular vectors from the small Gram matrix: n is far larger than m
        _, vectors = torch.linalg.eigh((rest @ rest.T).double())
        k = min(self.factors, m // 3)
        factor = (
            rest.T @ vectors[:, -k:].float() / math.sqrt(m) if k else rest.new_zeros(len(mean), 0)
        )
        left = (rest.square().sum(0) / m - factor.square().sum(1)).clamp(min=0)
        log = left.clamp(min=_FLOOR**2).log()
        levels = torch.linspace(float(log.min()), float(log.max()), _LEVELS, device=y.device)
        step = max(float(levels[1] - levels[0]), 1e-12)
        which = ((log - levels[0]) / step).round().long().clamp(0, _LEVELS - 1)
        self.mean_n.copy_(mean)
        self.weight_Dn.copy_(shift)
        self.centre_D.copy_(centre)
        self.factor_nk.zero_()
        self.factor_nk[:, :k] = factor
        self.factor_nk[:, self.factors :] = shift.T @ self._spread(x, each * told)
        self.levels_q.copy_(levels.exp())
        self.variance_n.copy_(self.levels_q[which])
        for q in range(_LEVELS):
            rows = self.factor_nk[which == q]
            self.inner_qkk[q] = rows.T @ rows
        return 1 - float(left.sum()) * people / max(total, 1e-12)

    def _spread(self, x: Tensor, told: Tensor) -> Tensor:
        """(D, D) R with R R^T the labels' covariance, each label's own, from (m, D) weighted rows.

        Args:
            x: conditions less their mean, times the root of the weight; 0 where not told.
            told: (m, D) weight where told, else 0.
        """
        out = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        start = 0
        for width in self.label_widths or (x.shape[1],):
            own = slice(start, start := start + width)
            people = told[:, own].amax(1).sum().clamp(min=1) if width else 1
            values, vectors = torch.linalg.eigh(x[:, own].T @ x[:, own] / people)
            out[own, own] = vectors * values.clamp(min=0).sqrt()
        return out.float()

    def centred(self, c: Tensor) -> Tensor:
        """(B, n) means given (B, D) conditions; a label of zeros says nothing."""
        told = known(c, self.label_widths)
        return self.mean_n + torch.where(told, c - self.centre_D, 0) @ self.weight_Dn

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
        unknown = (~known(c, self.label_widths)).float()
        on = torch.cat([unknown.new_ones(len(c), self.factors), unknown], 1)
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
