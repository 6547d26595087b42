"""One step of training that keeps what any patient can change of it within bounds.

Abadi et al. 2016 (arXiv:1607.00133), with the patient in place of the example: the gradient of a
patient's loss, the mean over all scans and draws, is clipped to norm C, the clipped ones are
summed, N(0, sigma^2 C^2) is added to the sum, and the whole is divided by a public constant.

Guarantee: with patients drawn independently with probability q, the step is one step of the
Poisson-subsampled Gaussian mechanism of noise multiplier sigma at rate q, under addition or removal
of one patient. That holds for an empty step as well, which is noise alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from synthmed import ranks
from synthmed.errors import SynthmedError
from synthmed.privacy.gradients import finite_only, norms_of
from synthmed.privacy.noise import SecretStream

Chunk = tuple[Sequence[Tensor], Tensor]
"""Gradients ((B, *shape) for each parameter) and losses (B,) of some patients."""
OFF = 1e-3
"""Distance in units of C by which rounding may move a sum of few clipped gradients."""
_PIECE = 2**16
"""Numbers of a gradient that are squared at a time: what fits the cache is three times as fast."""


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a private training; none of them may come from the patients.

    Args:
        sample_rate: q.
        noise_multiplier: sigma.
        clip: C.
        divisor: of the noisy sum, about the number of patients in a step.
    """

    sample_rate: float
    noise_multiplier: float
    clip: float
    divisor: float


@dataclass(frozen=True)
class Taken:
    """What a step saw and did, for the private log.

    Args:
        loss: mean over the patients drawn; 0 where there were none.
        n_patients: how many.
        largest: norm of the largest contribution, after clipping.
        off: distance of the sum from that of the clipped gradients by definition, in units of C.
        noise: mean square of what was added to the sum, in units of (sigma C)^2; about 1.
        gradient: norm of the update's direction, noise and all.
    """

    loss: float
    n_patients: int
    largest: float
    off: float
    noise: float
    gradient: float


@dataclass(frozen=True)
class _Part:
    """What a chunk adds to a step: the optimizer's sum, and that by definition."""

    summed: Tensor
    meant: Tensor
    largest: float
    losses: list[float]


def allowed_off(n_patients: int) -> float:
    """Distance of a sum from its definition, in units of C, that rounding may make."""
    return OFF + 1e-6 * n_patients


class _Optimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer, with exact norms and with noise from a secret stream."""

    stream: SecretStream | None = None
    norms: Tensor | None = None
    accumulated_iterations = 1
    """One sum a step, whatever the number of chunks."""

    def clip_and_accumulate(self) -> None:
        """Add up gradients cut to `max_grad_norm`, by norms that are right at any size."""
        if self.norms is None:
            raise ValueError("clipping needs the norms")
        factors = (self.max_grad_norm / self.norms.clamp(min=1e-12)).clamp(max=1)
        for p in self.params:
            total = torch.einsum("i,i...->...", factors.to(p.dtype), p.grad_sample)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total

    def add_noise(self) -> None:
        """Put the noisy sums into the parameters' gradients.

        Added in float64 and rounded once: the grid of the noise is not that of the result.
        """
        if self.stream is None:
            raise ValueError("a private step needs a stream of noise")
        deviation = self.noise_multiplier * self.max_grad_norm
        noise = self.stream.normal([sum(p.numel() for p in self.params)]).mul_(deviation)
        noise = noise.to(self.params[0].device)
        for p, part in zip(self.params, _parts(noise, self.params), strict=True):
            p.grad = part.add_(p.summed_grad.view_as(p)).to(p.dtype)


class PatientStep:
    """The steps of one optimizer.

    Args:
        optimizer: of the parameters to train.
        mechanism: the public constants.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self._optimizer = _Optimizer(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.divisor,
        )

    @property
    def params(self) -> list[nn.Parameter]:
        """What is trained, in the order of the gradients."""
        out: list[nn.Parameter] = self._optimizer.params
        return out

    def take(self, chunks: Iterable[Chunk | None], stream: SecretStream) -> Taken:
        """One step, in float32 whatever is around it: a sum in bfloat16 would pass the bound.

        Args:
            chunks: gradients ((B, *shape) for each parameter) and losses (B,) of the patients
                drawn, some at a time; none for an empty step. Of several processes each gives its
                own, all of them equally many, null where it has none left.
            stream: of this step's noise; the same in every process.

        Raises:
            SynthmedError: what was summed is not what was meant; nothing is changed then.
        """
        largest, losses = 0.0, []
        n, device = sum(p.numel() for p in self.params), self.params[0].device
        summed, meant = (torch.zeros(n, device=device) for _ in range(2))
        for chunk in chunks:
            # in the order of the chunks, whichever process worked them out
            for part in ranks.gathered(None if chunk is None else self._clipped(*chunk)):
                if part is not None:
                    summed += part.summed.to(device)
                    meant += part.meant.to(device)
                    largest = max(largest, part.largest)
                    losses += part.losses
        off = _norm(summed - meant) / self.mechanism.clip
        if off > allowed_off(len(losses)):
            raise SynthmedError(
                f"privacy: the sum of clipped gradients is off by {off:.2g} of the bound",
                "A defect of synthmed or Opacus: no private model can be made here.",
            )
        for p, total in zip(self.params, _parts(summed, self.params), strict=True):
            p.summed_grad = total  # type: ignore[attr-defined]
        self._optimizer.stream = stream
        self._optimizer.add_noise()
        added = _norm(self._gradient() - summed)
        scale = self.mechanism.noise_multiplier * self.mechanism.clip
        self._optimizer.scale_grad()
        norm = _norm(self._gradient())
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Taken(
            loss=sum(losses) / len(losses) if losses else 0.0,
            n_patients=len(losses),
            largest=largest,
            off=off,
            noise=(added / scale) ** 2 / n if scale else 0.0,
            gradient=norm,
        )

    def _gradient(self) -> Tensor:
        """(n,): what the optimizer is about to be told."""
        return torch.cat([p.grad.flatten() for p in self.params if p.grad is not None])

    def _clipped(self, gradients: Sequence[Tensor], losses: Tensor) -> _Part:
        """A chunk's clipped gradients added up, by the optimizer and by definition."""
        kept, self._optimizer.norms = finite_only(gradients)
        with self._exactly():
            # once more in another way: what is compared must not be wrong alike
            pieces = [piece for g in kept for piece in torch.split(g.flatten(1), _PIECE, 1)]
            norms = torch.stack([p.square().sum(1) for p in pieces]).double().sum(0).sqrt()
            factors = (self.mechanism.clip / norms.clamp(min=1e-12)).clamp(max=1).float()
            meant = torch.cat([torch.mv(g.flatten(1).T, factors) for g in kept])
            for p, g in zip(self.params, kept, strict=True):
                p.grad_sample, p.summed_grad = g, None  # type: ignore[attr-defined]
            self._optimizer.clip_and_accumulate()
        summed = torch.cat([p.summed_grad.flatten() for p in self.params])  # type: ignore[attr-defined]
        if ranks.world() > 1:
            summed, meant = summed.cpu(), meant.cpu()
        return _Part(summed, meant, float((norms * factors).max()), losses.tolist())

    def _exactly(self) -> torch.autocast:
        """float32, whatever is around it or was left open by what makes the chunks."""
        return torch.autocast(self.params[0].device.type, enabled=False)


def _parts(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """(n,) numbers as tensors of the shapes of parameters."""
    each: Sequence[Tensor] = flat.split_with_sizes([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(each, params, strict=True)]


def _norm(flat: Tensor) -> float:
    """Of (n,) numbers, right at any size."""
    return float(norms_of([flat[None]]))
