"""Train all of a model, or few parameters of one that `train.init` has brought.

What a private step can tell from its noise falls with the root of the number of parameters, so that
a small cohort can move a few thousand where a million would drown. `norms_and_conditions` are the
normalisations' scales and shifts, and the layers that take the condition in (a network names them
in `CONDITIONING`). `adapters` add a product of two thin matrices to the weight of every layer (Hu
et al. 2022, arXiv:2106.09685); after training they are added in for good.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from synthmed.backbones.generative import Generative, named_parameters, trained_by
from synthmed.errors import UsageError

Choice = Literal["all", "adapters", "norms_and_conditions"]

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm3d)
LAYERS = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)


class Adapter(nn.Module):
    """weight + up @ down, the weight seen as a matrix of rows by all else; no change at first.

    Args:
        shape: of the weight.
        rank: columns of `up` (R).
    """

    def __init__(self, shape: torch.Size, rank: int) -> None:
        super().__init__()
        rows, columns = shape[0], math.prod(shape[1:])
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, ...) to the same shape."""
        return weight + (self.up @ self.down).view_as(weight)


def restrict(model: Generative, choice: Choice, rank: int) -> None:
    """Leave only what is chosen to be trained: the rest no longer wants a gradient.

    New weights are drawn from torch's global generator. A parameter that its model keeps fixed
    stays so. Call it once, before any optimizer is made.

    Args:
        model: as built, or as started from another one.
        choice: `train.trainable`.
        rank: of the adapters.

    Raises:
        UsageError: some phase would have nothing to train, or undoes what adapters do.
    """
    if choice == "all":
        return
    for module in model.modules.values():
        kept = _conditioned(module) if choice == "norms_and_conditions" else set()
        for name, p in module.named_parameters():
            p.requires_grad_(p.requires_grad and name in kept)
    if choice == "adapters":
        _adapt(model, rank)
    parameters = named_parameters(model)
    for phase in (p for r in model.rounds() for p in r.phases):
        if phase.project is not None:
            raise UsageError(
                f"train.trainable: {choice} does not go with how {phase.name} bounds its weights: "
                "it would change those that are to stay",
                "Use backbone.lipschitz: penalty, or train.trainable: all.",
            )
        if not trained_by(phase, parameters):
            raise UsageError(
                f"train.trainable: {choice} leaves nothing to train in {phase.name}",
                "Use train.trainable: all or adapters.",
            )


def frozen(model: Generative) -> set[str]:
    """Full names, as in a model without adapters, of the parameters that are not trained."""
    return {
        k.replace(".parametrizations.weight.original", ".weight")
        for k, p in named_parameters(model).items()
        if not p.requires_grad
    }


def merge(model: Generative) -> None:
    """Add the adapters to the weights they belong to, so that the model is one without adapters."""
    for module in model.modules.values():
        for part in list(module.modules()):
            if parametrize.is_parametrized(part, "weight"):
                parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)


def n_trained(model: Generative) -> int:
    """Parameters that want a gradient."""
    return sum(p.numel() for p in named_parameters(model).values() if p.requires_grad)


def _conditioned(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisations, and of what takes the condition in."""
    kept = set()
    for at, part in module.named_modules():
        prefix = f"{at}." if at else ""
        if isinstance(part, NORMS):
            kept |= {prefix + k for k, _ in part.named_parameters(recurse=False)}
        inner = dict(part.named_modules())
        for name in getattr(part, "CONDITIONING", ()):
            if name in inner:  # a layer for a condition that there is not
                kept |= {f"{prefix}{name}.{k}" for k, _ in inner[name].named_parameters()}
    return kept


def _adapt(model: Generative, rank: int) -> None:
    for module in model.modules.values():
        for part in list(module.modules()):
            if isinstance(part, LAYERS):
                weight = part.weight
                adapter = Adapter(weight.shape, rank).to(weight.device, weight.dtype)
                parametrize.register_parametrization(part, "weight", adapter, unsafe=True)
                part.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
