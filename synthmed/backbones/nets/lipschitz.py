"""Three ways to bound how steep a critic can be, each a pure function of its parameters.

Arjovsky et al. 2017 (arXiv:1701.07875) need a critic that is K-Lipschitz and clip its weights;
Gulrajani et al. 2017 (arXiv:1704.00028) penalise slopes other than 1 between real and synthetic;
Miyato et al. 2018 (arXiv:1802.05957) divide every weight by its largest singular value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import grad

_FIRST_ITERATIONS = 50
_ITERATIONS = 3  # of each step: weights move by some percent, and the bound has to keep up


def gradient_penalty(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B,) squared distance of the score's slope from 1 (Gulrajani et al., eq. 3, second term).

    Args:
        score: (B, ...) to (B,), score i of sample i alone: the gradient of the sum is then each
            sample's own, in one pass for the whole batch.
        x: (B, ...), where the slope is measured.
    """
    slope = grad(lambda v: score(v).sum())(x)
    size: Tensor = torch.linalg.vector_norm(slope.float().flatten(1), dim=1)
    return (size - 1) ** 2


@torch.no_grad()
def clip_weights(module: nn.Module, bound: float) -> None:
    """Clamp every parameter to [-bound, bound], in place (Arjovsky et al., algorithm 1)."""
    for p in module.parameters():
        p.clamp_(-bound, bound)


class Spectral(nn.Module):
    """Singular vectors of a module's weights, and the weights divided by their singular values.

    A weight is a matrix of (outputs, all else). For a linear layer its largest singular value is
    the operator norm. For a convolution it bounds the map from one patch to one output voxel; the
    whole operator's norm is at most that times the root of the number of patches a voxel is in
    (27 for a 3 x 3 x 3 kernel with stride 1, 8 with stride 2).

    Args:
        module: whose parameters of two or more axes are normalised.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # a buffer's name may hold no dot
        self.names = {k: k.replace(".", "-") for k, p in module.named_parameters() if p.dim() > 1}
        weights = {k: p for k, p in module.named_parameters() if k in self.names}
        for name, key in self.names.items():
            matrix = weights[name].detach().flatten(1)
            self.register_buffer(f"left-{key}", nn.functional.normalize(matrix.sum(1), dim=0))
            self.register_buffer(f"right-{key}", nn.functional.normalize(matrix.sum(0), dim=0))
        for _ in range(_FIRST_ITERATIONS):
            self._iterate(weights)

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Power iterations for every weight, in place (Miyato et al., algorithm 1)."""
        for _ in range(_ITERATIONS):
            self._iterate(weights)

    @torch.no_grad()
    def _iterate(self, weights: Mapping[str, Tensor]) -> None:
        for name, key in self.names.items():
            left, right = self.get_buffer(f"left-{key}"), self.get_buffer(f"right-{key}")
            matrix = weights[name].detach().flatten(1)
            right.copy_(nn.functional.normalize(matrix.T @ left, dim=0))
            left.copy_(nn.functional.normalize(matrix @ right, dim=0))

    def normalised(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters with each weight divided by left' W right, which the gradient goes through."""
        out = dict(params)
        for name, key in self.names.items():
            left, right = self.get_buffer(f"left-{key}"), self.get_buffer(f"right-{key}")
            with torch.autocast(right.device.type, enabled=False):
                sigma = left @ (params[name].flatten(1) @ right)
            out[name] = params[name] / sigma
        return out
