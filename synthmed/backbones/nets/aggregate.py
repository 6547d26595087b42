"""The aggregate posterior of a VAE: learned moments, and the total correlation they show."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GAIN = 10.0  # as in nets/noise.py: Adam moves every parameter by about the learning rate a step
# The encoder answers to these correlations while they answer to it: the slower they are, the
# longer the two circle each other.
_FAST = 150.0


class AggregatePosterior(nn.Module):
    """Moments of all patients' posteriors, learned by gradient, and the dependence they show.

    The total correlation KL(q(z) || prod_j q(z_j)) of the aggregate posterior q (Chen et al. 2018,
    arXiv:1802.04942, eq. 2) is a property of all patients at once, and the minibatch estimators of
    that paper mix the patients of a batch. Here patients meet in parameters alone: the marginals
    N(A c + m, s^2), and the correlations R of u = (z - A c - m) / s.

    - `fit` is what these parameters learn from: a patient's cross entropy under the marginals, and
      the squared error of R_ij as an estimate of its E[u_i u_j].
    - `penalty` is 1/2 sum_(i<j) (2 R_ij E[u_i u_j] - R_ij^2) of a patient, the parameters fixed.

    Both are exact in the posterior's mean and variance, depend on one patient and the parameters,
    and so can be clipped patient by patient: differential privacy charges nothing for the penalty
    beyond the L (L + 3) / 2 + L D parameters that share the noise.

    What it estimates: where the parameters are fitted, the mean of `penalty` over patients is
    1/2 sum_(i<j) R_ij^2 and its gradient by the posteriors (in units of s) is that sum's. It is
    the leading term of the total correlation -1/2 log det R of a Gaussian with the aggregate's
    moments (DIP-VAE, Kumar et al. 2018, arXiv:1711.00848, penalises the same covariances);
    dependence that leaves no correlation is not seen. The whole of -1/2 log det R, written the
    same way, is no use: R lags behind the encoder, which then gains without bound by moving out
    along R's narrow directions. Here the pull is at most that of |R_ij| = 1.

    Args:
        condition_width: D.
        latent: L.
    """

    def __init__(self, condition_width: int, latent: int) -> None:
        super().__init__()
        self.weight_DL = nn.Parameter(torch.zeros(condition_width, latent))
        self.mean_L = nn.Parameter(torch.zeros(latent))
        self.log_sd_L = nn.Parameter(torch.zeros(latent))
        self.correlation_LL = nn.Parameter(torch.zeros(latent, latent))  # below the diagonal

    def forward(self, mean: Tensor, variance: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Penalty and fit of posteriors.

        Args:
            mean: (B, L) of q(z | x, c).
            variance: (B, L).
            c: (B, D) encoded conditions.

        Returns:
            Penalty (B,) in nats, whose gradient does not reach the parameters, and fit (B,), whose
            gradient reaches nothing else.
        """
        centre = _GAIN * (self.mean_L + (c.float()[:, :, None] * self.weight_DL).sum(1))
        log_sd = _GAIN * self.log_sd_L
        correlation = (_FAST * self.correlation_LL).tril(-1)

        u = (mean - centre.detach()) / log_sd.detach().exp()
        fixed = correlation.detach().clamp(-1, 1)
        # products are written out: a matrix product would be rounded to bfloat16 in training
        products = u[:, :, None] * u[:, None]
        penalty = (fixed * products - 0.5 * fixed**2).sum((1, 2))

        away = (mean.detach() - centre) ** 2 + variance.detach()
        marginals = (0.5 * away * (-2 * log_sd).exp() + log_sd).sum(1)
        error = (correlation - products.detach().tril(-1)) ** 2
        return penalty, marginals + 0.5 * error.sum((1, 2))


def gaussian_total_correlation(covariance: Tensor) -> float:
    """Total correlation in nats of N(., covariance), (L, L): -1/2 log det of its correlations.

    >>> gaussian_total_correlation(torch.tensor([[4.0, 1.2], [1.2, 1.0]]))  # r = 0.6
    0.2231435...
    """
    sd = covariance.diagonal().sqrt()
    return float(-0.5 * torch.linalg.slogdet(covariance / sd / sd[:, None]).logabsdet)
