"""One gradient a patient, in one of several ways that give the same, whichever is fastest.

Neither way mixes patients, whatever the network does: `loop` shows the loss one patient at a time,
`vmap` runs it as if alone. Opacus' own hooks are no third way: they cannot differentiate a
critic's penalty, miss parameters that are used outside their module, and were slower by three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from synthmed.backbones.generative import Batch, Draws, Params, Phase

Way = Literal["loop", "vmap"]
_BLOCK = 1024
"""Numbers of a gradient whose squares are added up in float32."""


def per_patient(
    way: Way,
    phase: Phase,
    params: Params,
    wanted: Sequence[str],
    batch: Batch,
    draws: Draws,
    progress: float,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of each patient's loss.

    Args:
        way: how.
        phase: whose loss.
        params: all parameters by name.
        wanted: names of those that are trained.
        batch: B patients.
        draws: theirs, stacked along B.
        progress: of the round, 0 to 1.

    Returns:
        For each wanted parameter (B, *shape) float32, and the losses (B,).
    """
    fixed = {k: p.detach() for k, p in params.items() if k not in set(wanted)}
    moving = {k: params[k].detach() for k in wanted}

    def alone(mine: Mapping[str, Tensor], one: Batch, noise: Mapping[str, Tensor]) -> Tensor:
        patient = Batch(*(t.unsqueeze(0) for t in one))
        loss = phase.loss(
            {**fixed, **mine}, patient, {k: v.unsqueeze(0) for k, v in noise.items()}, progress
        )
        return loss.squeeze(0)

    if way == "vmap":
        each = vmap(grad_and_value(alone), in_dims=(None, 0, 0), randomness="error")
        gradients, losses = each(moving, batch, dict(draws))
        return [gradients[k].float() for k in wanted], losses.detach()
    rows, losses_of = [], []
    for i in range(len(batch.mask)):
        one, noise = Batch(*(t[i] for t in batch)), {k: v[i] for k, v in draws.items()}
        if len(one.mask) == 1:
            # the same scan twice has the same mean: a convolution of batch 1 takes a slow path
            one = Batch(*(torch.cat([t, t]) for t in one))
            noise = {k: torch.cat([v, v]) for k, v in noise.items()}
        mine = {k: v.requires_grad_() for k, v in moving.items()}
        loss = alone(mine, one, noise)
        found = torch.autograd.grad(loss, list(mine.values()), allow_unused=True)
        pairs = zip(mine.values(), found, strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in pairs])
        losses_of.append(loss.detach())
    stacked = [torch.stack(column).float() for column in zip(*rows, strict=True)]
    return stacked, torch.stack(losses_of)


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """(B,) float64 norms over all parameters of each patient's gradient.

    Squares are added up in float32 within blocks and in float64 over them: a row of millions added
    up in float32, as Opacus does, comes out small by up to two per cent, and what is clipped by it
    exceeds the bound by as much.
    """
    each = [part for g in gradients for part in _block_norms(g.float().flatten(1))]
    out: Tensor = torch.linalg.vector_norm(torch.cat(each, 1), dim=1, dtype=torch.float64)
    return out


def _block_norms(rows: Tensor) -> list[Tensor]:
    """Norms of parts of (B, N) rows: (B, parts) each, in float32."""
    whole = rows.shape[1] // _BLOCK * _BLOCK
    parts = []
    if whole:
        blocks = rows[:, :whole].reshape(len(rows), -1, _BLOCK)
        parts.append(torch.linalg.vector_norm(blocks, dim=2))
    if whole < rows.shape[1]:
        parts.append(torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True))
    return parts


def finite_only(gradients: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradients, with those of a patient who has any number that is not one set to 0.

    One scan with an overflow would otherwise decide the whole step, which no clipping bounds.

    Returns:
        The gradients, and their norms as `norms_of` has them.
    """
    norms = norms_of(gradients)
    bad = ~norms.isfinite()
    if not bad.any():
        return list(gradients), norms
    kept = [torch.where(bad.reshape(-1, *[1] * (g.ndim - 1)), 0, g) for g in gradients]
    return kept, torch.where(bad, 0, norms)
