"""Densities of codes that are fitted after training, without gradients, and held in buffers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_PER_DIRECTION = 3
"""People that a principal direction must rest on before a mixture may have a shape along it."""

_PER_COMPONENT = 10
"""People that a component must rest on: fewer would be a memory of single patients."""


def regress(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of z on the condition, with a small ridge.

    Args:
        z: (n, L).
        c: (n, D) encoded conditions.

    Returns:
        Weights (D, L), bias (L,), and what is left of z (n, L); float64 on the CPU.
    """
    z, c = z.double().cpu(), c.double().cpu()
    centre, bias = c.mean(0), z.mean(0)
    x = c - centre
    # ridge: a condition that hardly varies must not steer the code
    gram = x.T @ x + 0.1 * len(x) / 100 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ (z - bias))
    return weight, bias - centre @ weight, z - bias - x @ weight


class CodeMixture(nn.Module):
    """p(code | c): linear in the condition, and a Gaussian mixture of what that leaves.

    code = A c + b + U^T s, with s from a mixture of up to M Gaussians and U the q strongest
    principal directions of the codes about A c + b (Ghosh et al. 2020, arXiv:1903.12436, section 4,
    fit their mixture to the codes as they are). Of the weakest, past a third of the number of
    people, only the variance is known: along these s is normal and independent of all else, in
    every component; without them samples would vary less than the codes do. The condition enters by
    regression and not as a part of the mixture's vector, since one-hot conditions would give every
    category components of its own: on small cohorts few patients each. The price is that all
    conditions share one shape of the rest. Directions past the q-th are not sampled; `fit` tells
    the share kept.

    Args:
        size: length of a code.
        condition_width: D.
        components: M, the most components.
        directions: q, the most principal directions.
    """

    weight_DN: Tensor
    bias_N: Tensor
    directions_QN: Tensor
    share_M: Tensor
    mean_MQ: Tensor
    factor_MQQ: Tensor

    def __init__(self, size: int, condition_width: int, components: int, directions: int) -> None:
        super().__init__()
        q = min(size, directions)
        self.register_buffer("weight_DN", torch.zeros(condition_width, size))
        self.register_buffer("bias_N", torch.zeros(size))
        self.register_buffer("directions_QN", torch.eye(q, size))
        share = torch.zeros(components)
        share[0] = 1
        self.register_buffer("share_M", share)
        self.register_buffer("mean_MQ", torch.zeros(components, q))
        self.register_buffer("factor_MQQ", torch.eye(q).repeat(components, 1, 1))

    def fit(self, codes: Tensor, c: Tensor, people: int | None = None) -> dict[str, float]:
        """Fit everything; the number and kind of components have the least BIC (Schwarz 1978).

        Candidates are 1 to M components with full or diagonal covariances. A component that
        rests on fewer than ten people (full covariances: than twice its dimensions) is refused,
        since a likelihood has no upper bound there.

        Args:
            codes: (n, N), as many of each person.
            c: (n, D) encoded conditions.
            people: how many they are of; null where every code is a person of its own.

        Returns:
            `mixture_components`, and `mixture_explained`, the share of the codes' variance about
            A c + b that the kept directions hold.
        """
        weight, bias, rest = regress(codes, c)
        n = len(rest) if people is None else people
        _, spread, directions = np.linalg.svd(rest.numpy(), full_matrices=False)
        q = min(len(self.directions_QN), len(spread))
        shaped = min(q, max(1, n // _PER_DIRECTION))
        # the sign of a direction is free: fixed here, or two machines would differ
        largest = np.abs(directions[:q]).argmax(1)
        directions = directions[:q] * np.sign(directions[np.arange(q), largest])[:, None]
        scores = rest.numpy() @ directions.T
        # one unit for all scores, so that the smallest variance allowed is relative
        unit = max(float(np.sqrt((scores[:, :shaped] ** 2).sum(1).mean() / shaped)), 1e-12)
        shares, means, covariances = _least_bic(scores[:, :shaped] / unit, len(self.share_M), n)
        m = len(shares)
        for buffer in (self.share_M, self.mean_MQ, self.factor_MQQ, self.directions_QN):
            buffer.zero_()
        self.weight_DN.copy_(weight)
        self.bias_N.copy_(bias)
        self.directions_QN[:q] = torch.from_numpy(directions * unit)
        self.share_M[:m] = torch.from_numpy(shares)
        self.mean_MQ[:m, :shaped] = torch.from_numpy(means)
        self.factor_MQQ[:m, :shaped, :shaped] = torch.from_numpy(np.linalg.cholesky(covariances))
        weak = torch.from_numpy(spread[shaped:q] / math.sqrt(len(rest)) / unit)
        self.factor_MQQ[:m, shaped:q, shaped:q] = weak.diag().float()
        total = float((spread**2).sum())
        explained = float((spread[:q] ** 2).sum()) / total if total else 1.0
        return {"mixture_components": m, "mixture_explained": round(explained, 4)}

    @property
    def n_numbers(self) -> int:
        """Length q of the standard normal numbers that a code is made of."""
        return self.mean_MQ.shape[1]

    def forward(self, uniform: Tensor, unit: Tensor, c: Tensor) -> Tensor:
        """Codes (B, N) from uniform numbers (B,), standard normal ones (B, q) and (B, D)."""
        edges = self.share_M.double().cumsum(0)
        # a sum short of 1 by rounding must not reach a component of share 0
        chosen = torch.searchsorted(edges, uniform.double() * edges[-1], right=True)
        chosen = chosen.clamp(max=int((self.share_M > 0).sum()) - 1)
        s = self.mean_MQ[chosen] + (self.factor_MQQ[chosen] * unit[:, None]).sum(2)
        return s @ self.directions_QN + c @ self.weight_DN + self.bias_N


def _least_bic(
    scores: npt.NDArray[np.float64], most: int, people: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shares (m,), means (m, q) and covariances (m, q, q) of the mixture with the least BIC.

    It counts people: several codes of one are no more evidence than one.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    q = scores.shape[1]
    best, least = None, math.inf
    for kind, needed in (("full", max(_PER_COMPONENT, 2 * q)), ("diag", _PER_COMPONENT)):
        for m in range(1, most + 1):
            if m > 1 and m * needed > people:
                break
            candidate: Any = GaussianMixture(
                m, covariance_type=kind, reg_covar=1e-5, max_iter=500, random_state=0
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                candidate.fit(scores)
            if m > 1 and candidate.weights_.min() * people < needed:
                continue
            spread = q * (q + 1) // 2 if kind == "full" else q
            numbers = m * (q + spread) + m - 1
            bic = -2 * people * float(candidate.score(scores)) + numbers * math.log(people)
            if bic < least:
                best, least = candidate, bic
    if best is None:
        raise RuntimeError("a mixture of one component is always a candidate")
    covariances = best.covariances_
    if covariances.ndim == 2:
        covariances = np.stack([np.diag(v) for v in covariances])
    return best.weights_, best.means_, covariances
