"""What a private training must show on made-up patients before it may see a real one.

The mechanism is sound only if a patient's loss is its own, its gradient is right and what it adds
to a step is bounded. Each is tried on random numbers, against the slowest and plainest way to
compute it; a model that fails is not trained. This looks at what a network does, so that it needs
no list of layers to trust.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from synthmed.backbones.generative import Batch, Draws, Generative, Phase, VolumeSpec
from synthmed.errors import UsageError
from synthmed.keys import Key
from synthmed.privacy.gradients import Way, norms_of, per_patient

TOLERANCE = 1e-4
"""Largest relative error of a patient's gradient."""
WAYS: tuple[Way, ...] = ("vmap", "loop")
N_PATIENTS = 3
N_SCANS = (2, 1, 2)
"""Scans of each made-up patient; who has fewer is padded."""


def made_up(phase: Phase, spec: VolumeSpec, key: Key, device: str) -> tuple[Batch, Draws]:
    """Random patients of the right shapes, one of them padded."""
    g = key.fold("made up").torch()
    b, s = N_PATIENTS, max(N_SCANS)
    mask = torch.tensor([[float(i < n) for i in range(s)] for n in N_SCANS])
    batch = Batch(
        x=torch.rand(b, s, spec.channels, *spec.grid, generator=g),
        c=torch.randn(b, s, spec.condition_width, generator=g),
        given=(torch.rand(b, s, spec.given, *spec.grid, generator=g) > 0.5).float(),
        mask=mask,
    )
    each = [phase.draw(key.fold("draw", i).torch(), s) for i in range(b)]
    draws = {k: torch.stack([d[k] for d in each]).to(device) for k in each[0]}
    return Batch(*(t.to(device) for t in batch)), draws


def examine(
    model: Generative,
    phase: Phase,
    params: Mapping[str, Tensor],
    wanted: Sequence[str],
    spec: VolumeSpec,
    key: Key,
    device: str,
    allowed: Sequence[Way] = WAYS,
) -> tuple[Way, float]:
    """The fastest allowed way to this phase's gradients that is right, and its relative error.

    Raises:
        UsageError: a patient's loss depends on others or changes the model by being computed, or
            no way gives its gradient.
    """
    batch, draws = made_up(phase, spec, key, device)
    _check_isolation(model, phase, params, batch, draws)
    exact = [_plainly(phase, params, wanted, batch, draws, i) for i in range(N_PATIENTS)]
    times: dict[Way, float] = {}
    errors: dict[Way, float] = {}
    reasons = []
    for way in allowed:
        try:
            per_patient(way, phase, params, wanted, batch, draws, 0.5)
            started = time.monotonic()
            gradients, _ = per_patient(way, phase, params, wanted, batch, draws, 0.5)
            times[way] = time.monotonic() - started
        except RuntimeError as error:  # vmap refuses what it cannot run per patient
            reasons.append(f"{way}: {str(error).splitlines()[0][:120]}")
            continue
        errors[way] = max(_error([g[i] for g in gradients], e) for i, e in enumerate(exact))
        if errors[way] > TOLERANCE:
            reasons.append(f"{way}: gradients are off by {errors[way]:.1e}")
    right = [way for way in times if errors[way] <= TOLERANCE]
    if not right:
        raise UsageError(
            f"privacy: no way gives the right gradient a patient of {phase.name} "
            f"({'; '.join(reasons)})",
            "Train in fp32 (train.precision: fp32), or use another backbone under privacy.",
        )
    best = min(right, key=lambda way: times[way])
    return best, errors[best]


def _check_isolation(
    model: Generative, phase: Phase, params: Mapping[str, Tensor], batch: Batch, draws: Draws
) -> None:
    """Change one patient: the others' losses keep every bit, and the model all its buffers."""
    before = {
        f"{name}.{k}": v.clone()
        for name, module in model.modules.items()
        for k, v in module.named_buffers()
    }
    with torch.no_grad():
        first = phase.loss(params, batch, draws, 0.5)
        other = Batch(*(t.clone() for t in batch))
        other.x[1] = 1 - other.x[1].flip(-1)
        other.c[1] = -other.c[1]
        second = phase.loss(params, other, draws, 0.5)
    moved = [i for i in (0, 2) if not torch.equal(first[i], second[i])]
    if moved:
        raise UsageError(
            f"privacy: in {phase.name} one patient's loss changes when another patient does, so no "
            "bound on what a patient contributes holds",
            "A layer mixes patients (a batch norm, a batch statistic): use group or layer norms.",
        )
    if torch.equal(first[1], second[1]):
        raise UsageError(
            f"privacy: the loss of {phase.name} does not depend on the patient",
            "This phase reads no patient, or is broken.",
        )
    for name, module in model.modules.items():
        for k, v in module.named_buffers():
            if not torch.equal(v, before[f"{name}.{k}"]):
                raise UsageError(
                    f"privacy: computing the loss of {phase.name} changes {name}.{k}, which no "
                    "noise protects",
                    "A layer keeps running statistics of patients: use one that does not.",
                )


def _plainly(
    phase: Phase,
    params: Mapping[str, Tensor],
    wanted: Sequence[str],
    batch: Batch,
    draws: Draws,
    i: int,
) -> list[Tensor]:
    """Patient i's gradient by brute force: a batch of this patient alone, padding left out."""
    n = int(batch.mask[i].sum())
    one = Batch(*(t[i : i + 1, :n] for t in batch))
    mine = {k: p.detach().clone().requires_grad_(k in set(wanted)) for k, p in params.items()}
    loss = phase.loss(mine, one, {k: v[i : i + 1, :n] for k, v in draws.items()}, 0.5)
    found = torch.autograd.grad(loss.sum(), [mine[k] for k in wanted], allow_unused=True)
    return [
        torch.zeros_like(mine[k]) if g is None else g for k, g in zip(wanted, found, strict=True)
    ]


def _error(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact gradient."""
    differences = [(g - e)[None] for g, e in zip(gradient, exact, strict=True)]
    size = norms_of([e[None] for e in exact])
    return float(norms_of(differences) / size.clamp(min=1e-12))
