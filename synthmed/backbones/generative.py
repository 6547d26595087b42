"""What every backbone builds: modules, rounds of phases, and a sampler.

One loop (stages/train.py) trains them all. A round's phases interleave; rounds follow each other.
A VAE is one round with one phase; a GAN one round with two, of which only the critic reads
patients; a latent model two rounds, the first of which may finish with a fit without gradients.

Axes: B patients, S scans of a patient (padded, see `Batch.mask`), C channels, X Y Z voxels,
D encoded condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from synthmed.config import Optimizer

Params = Mapping[str, Tensor]
"""Parameters of all modules by full name, `module.parameter`."""

Draws = Mapping[str, Tensor]
"""All randomness of one patient at one step, or of a batch of them stacked along B."""


class Batch(NamedTuple):
    """Scans of B patients.

    Args:
        x: (B, S, C, X, Y, Z) float32, images about 0 to 1, masks 0 to 1.
        c: (B, S, D) float32, encoded conditions.
        mask: (B, S) float32, 1 for a scan and 0 for padding; at least one scan a patient.
    """

    x: Tensor
    c: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Phase:
    """One optimizer and what it minimises.

    Args:
        name: unique in the model; names its optimizer state and its column in the log.
        trainable: which parameters it changes, by full name.
        draw: all randomness of one patient at one step, from that patient's own generator and the
            number of scans S in the batch; the same shapes for every patient.
        loss: (params, batch, draws, progress) to one loss a patient, (B,). Pure: it reads
            nothing else that changes, and patient i's loss depends on patient i alone. `batch` is
            None where the phase reads no patients, B then being the draws' first axis. `progress`
            runs from 0 to 1 over the round.
        optimizer: settings of its AdamW.
        reads_patients: True where the gradient must be privatised when privacy is asked for.
        ema: decay of the moving average whose weights are kept, or None.
        every: it steps at each `every`-th step of the round.
    """

    name: str
    trainable: Callable[[str], bool]
    draw: Callable[[Generator, int], Draws]
    loss: Callable[[Params, Batch | None, Draws, float], Tensor]
    optimizer: Optimizer
    reads_patients: bool
    ema: float | None = None
    every: int = 1


@dataclass(frozen=True)
class Round:
    """Phases that interleave, for a share of the training budget.

    Args:
        phases: in the order they step.
        share: of the run's steps (or minutes); the shares of a model's rounds sum to 1.
        finish: called once after the last step with batches over all training patients, in a
            fixed order; sets what is fitted without gradients (a buffer of a module) and returns
            figures for the training log.
        finish_privacy: what `finish` costs under differential privacy.
    """

    phases: Sequence[Phase]
    share: float = 1.0
    finish: Callable[[Sequence[Batch]], Mapping[str, float]] | None = None
    finish_privacy: Literal["none", "charged", "refused"] = "none"


class Generative(Protocol):
    """What `Backbone.build` returns."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Everything that is checkpointed, by name."""
        ...

    def rounds(self) -> Sequence[Round]:
        """The training plan; the same at every call."""
        ...

    def sample(self, conditions: Tensor, keys: Tensor) -> Tensor:
        """Synthetic volumes.

        Args:
            conditions: (B, D) float32 encoded conditions.
            keys: (B,) int64; row i of the result depends on row i of both alone.

        Returns:
            (B, C, X, Y, Z) float32 on the modules' device.
        """
        ...


def submodule(params: Params, module: str) -> dict[str, Tensor]:
    """The parameters of one module, under their names inside it (for `functional_call`)."""
    prefix = module + "."
    return {k[len(prefix) :]: v for k, v in params.items() if k.startswith(prefix)}
