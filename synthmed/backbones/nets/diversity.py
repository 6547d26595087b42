"""How varied a set of volumes is, beside another: what tells a collapsed generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE = 8
_LEAST = 0.01  # standard deviation, and difference, below which volumes count as flat and alike


def pooled(x: Tensor) -> Tensor:
    """(n, C, X, Y, Z) averaged to at most 8 voxels a side, (n, F): anatomy without grain."""
    nx, ny, nz = (min(_SIDE, n) for n in x.shape[-3:])
    return F.adaptive_avg_pool3d(x.float(), (nx, ny, nz)).flatten(1)


def apart(x: Tensor, y: Tensor) -> Tensor:
    """(n,) log of the root mean squared difference of coarse shapes of (n, C, X, Y, Z) volumes.

    Each is standardised first, or the cheapest way to be far apart would be another brightness.
    """
    a, b = pooled(x), pooled(y)
    a, b = ((v - v.mean(1, keepdim=True)) / (v.std(1, keepdim=True) + _LEAST) for v in (a, b))
    return 0.5 * ((a - b).square().mean(1) + _LEAST**2).log()


def distances(x: Tensor) -> Tensor:
    """(n, n) Euclidean distances of (n, F) rows, by differences: exact for equal rows."""
    return torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(x: Tensor) -> float:
    """Mean distance between two different rows of (n, F); 0 for fewer than two."""
    n = len(x)
    return float(distances(x).sum() / (n * (n - 1))) if n > 1 else 0.0


def effective_number(x: Tensor, bandwidth: float) -> float:
    """How many different rows there are: 1 if all are alike, n if all are far apart.

    The exponential of the entropy of the eigenvalues of K / n, K the Gaussian kernel (Vendi score,
    Friedman and Dieng 2023, arXiv:2210.02410, eq. 2).

    Args:
        x: (n, F).
        bandwidth: standard deviation of the kernel, above 0.
    """
    kernel = (-0.5 * (distances(x) / bandwidth) ** 2).exp()
    values = torch.linalg.eigvalsh(kernel / len(x)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def compare(training: Tensor, synthetic: Tensor) -> dict[str, float]:
    """Variety of synthetic volumes over that of training scans, 1 being equal.

    Args:
        training: (n, C, X, Y, Z), n at least 2.
        synthetic: the same shape: the figures grow with n.

    Returns:
        `spread`, the ratio of mean distances between two volumes; `offset`, the distance of the
        two means over the training scans' mean distance; `modes` and `modes_training`, the
        effective numbers, with half that distance as bandwidth.
    """
    a, b = pooled(training), pooled(synthetic)
    apart = mean_distance(a)
    scale = max(apart, 1e-12)
    return {
        "spread": mean_distance(b) / scale,
        "offset": float((a.mean(0) - b.mean(0)).norm()) / scale,
        "modes": effective_number(b, scale / 2),
        "modes_training": effective_number(a, scale / 2),
    }
