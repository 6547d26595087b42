"""What every backbone builds: modules, rounds of phases, and a sampler.

One loop (stages/train.py) trains them all. A round's phases interleave; rounds follow each other.
A VAE is one round with one phase; a GAN one round with two, of which only the critic reads
patients; a latent model two rounds, the first of which may finish with a fit without gradients.

Axes: B patients, S scans of a patient (padded, see `Batch.mask`), C channels that are generated,
K mask channels that are given, X Y Z voxels, D encoded condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn

from synthmed.errors import UsageError

if TYPE_CHECKING:
    from synthmed.config import Optimizer
    from synthmed.keys import Key

Params = Mapping[str, Tensor]
"""Parameters of all modules by full name, `module.parameter`."""

Draws = Mapping[str, Tensor]
"""All randomness of one patient at one step, or of a batch of them stacked along B."""


@dataclass(frozen=True)
class VolumeSpec:
    """What a model draws, and what it is told.

    Args:
        channels: C, generated channels.
        grid: (X, Y, Z).
        condition_width: D, length of an encoded condition; 0 for an unconditional model.
        given: K, channels of a mask that is given at training and at sampling; 0 for none.
        draw_condition: an encoded condition (D,) from public constants alone, for a phase that
            reads no patients; None stands for all zero.
        masks: how many of the C channels are masks; they come last.
        told_width: how many of the D numbers, the last ones, tell how much of the grid a scan
            covers and what augmentation did to it; all zero is a whole scan as it was, never
            something unknown.
        label_widths: how many of the D numbers each label has, in their order, `told_width` not
            among them; empty where they all are one label's. See `known`.
        number_names: what the D numbers are called in a table; empty where they have no names.
    """

    channels: int
    grid: tuple[int, int, int]
    condition_width: int
    given: int = 0
    draw_condition: Callable[[Generator], Tensor] | None = None
    masks: int = 0
    told_width: int = 0
    label_widths: tuple[int, ...] = ()
    number_names: tuple[str, ...] = ()

    @property
    def n_labels(self) -> int:
        """How many of the D numbers, the first ones, are those of labels."""
        return self.condition_width - self.told_width


class Batch(NamedTuple):
    """Scans of B patients.

    Args:
        x: (B, S, C, X, Y, Z) float32, images about 0 to 1, masks 0 to 1.
        c: (B, S, D) float32, encoded conditions; all zero says that nothing is known.
        given: (B, S, K, X, Y, Z) float32, masks 0 to 1 that the model is told; K may be 0.
        mask: (B, S) float32, 1 for a scan and 0 for padding; at least one scan a patient.
    """

    x: Tensor
    c: Tensor
    given: Tensor
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
        optimizer: what steps it, and how.
        reads_patients: True where the gradient must be privatised when privacy is asked for.
        ema: decay of the moving average whose weights are kept, or None.
        every: it steps at each `every`-th step of the round.
        project: called after each of its steps; changes parameters or buffers in place by a rule
            that reads no patient (weight clipping, a power iteration).
    """

    name: str
    trainable: Callable[[str], bool]
    draw: Callable[[Generator, int], Draws]
    loss: Callable[[Params, Batch | None, Draws, float], Tensor]
    optimizer: Optimizer
    reads_patients: bool
    ema: float | None = None
    every: int = 1
    project: Callable[[], None] | None = None


@dataclass(frozen=True)
class Round:
    """Phases that interleave, for a share of the training budget.

    Args:
        phases: in the order they step; empty where the round is its `finish` alone.
        share: of the run's steps (or minutes); the shares of a model's rounds sum to 1, and a
            round without phases has share 0.
        finish: called once after the last step with batches over all training patients, in a
            fixed order; sets what is fitted without gradients (a buffer of a module) and returns
            figures for the training log.
        finish_privacy: what `finish` costs under differential privacy.
        finish_scans: `finish` is given the first scans of so many patients at most, evenly spread;
            None for all scans of all.
        finish_floats: float32 numbers that `finish` holds at once for each scan, beside what a
            step needs.
    """

    phases: Sequence[Phase]
    share: float = 1.0
    finish: Callable[[Sequence[Batch]], Mapping[str, float]] | None = None
    finish_privacy: Literal["none", "charged", "refused"] = "none"
    finish_scans: int | None = None
    finish_floats: int = 0


@dataclass(frozen=True)
class Examination:
    """What a trained model shows of itself, for the private side alone.

    Args:
        figures: name to number.
        tables: name to rows, each column name to value, all rows with the same columns.
        pictures: name to a grey picture (H, W), uint8, with a sentence that says what it shows.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, float | str]]] = field(default_factory=dict)
    pictures: Mapping[str, tuple[npt.NDArray[np.uint8], str]] = field(default_factory=dict)


class Generative(Protocol):
    """What `Backbone.build` returns."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Everything that is checkpointed, by name."""
        ...

    def rounds(self) -> Sequence[Round]:
        """The training plan; the same at every call."""
        ...

    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """What goes wrong in training, one sentence each, for a person; empty when nothing does.

        Args:
            recent: the last lines of the training log, of one round, oldest first.
            figures: what the finished rounds have found.
        """
        ...

    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """Look at the trained model, on a fixed subset of patients of either side.

        Args:
            train: patients that were trained on.
            holdout: patients that were not; None under differential privacy.
        """
        ...

    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """How well the trained weights know each scan: white-box membership attacks.

        Args:
            x: (n, C, X, Y, Z) float32 scans, as in `Batch`.
            c: (n, D) float32 encoded conditions of their own.
            given: (n, K, X, Y, Z) float32 masks that the model is told; K may be 0.
            key: of all randomness; every scan gets the same draws, so that scores compare.

        Returns:
            Name of each attack to (n,) float64, higher for a scan that is better known; row i
            depends on row i of the three alone.
        """
        ...

    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """Synthetic volumes.

        Args:
            conditions: (B, D) float32 encoded conditions.
            keys: (B,) int64; row i of the result depends on row i of all three alone.
            given: (B, K, X, Y, Z) float32 masks to draw an image for; K may be 0.

        Returns:
            (B, C, X, Y, Z) float32 on the modules' device.
        """
        ...


def named_parameters(model: Generative) -> dict[str, nn.Parameter]:
    """All parameters by `module.parameter`."""
    return {
        f"{name}.{k}": p
        for name, module in model.modules.items()
        for k, p in module.named_parameters()
    }


def trained_by(phase: Phase, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of a model's parameters that a phase changes: its own, less what is kept fixed."""
    return {k: p for k, p in params.items() if phase.trainable(k) and p.requires_grad}


def submodule(params: Params, module: str) -> dict[str, Tensor]:
    """The parameters of one module, under their names inside it (for `functional_call`)."""
    prefix = module + "."
    return {k[len(prefix) :]: v for k, v in params.items() if k.startswith(prefix)}


def known(labels: Tensor, widths: Sequence[int]) -> Tensor:
    """Which numbers of encoded labels (n, D) are those of a label that is known: (n, D) bool.

    A label is unknown where all of its numbers are zero.

    Args:
        labels: without what tells of view and augmentation.
        widths: numbers of each label; empty where all D are one label's.
    """
    blocks = torch.split(labels, list(widths) or [labels.shape[1]], 1)
    return torch.cat([(b != 0).any(1, keepdim=True).expand_as(b) for b in blocks], 1)


def refuse_given(name: str, spec: VolumeSpec) -> None:
    """Raise where a family that cannot draw an image for a mask is asked to."""
    if spec.given:
        raise UsageError(
            f"backbone {name}: cannot draw an image for a mask that is given",
            "Use ddpm or cgan, or let the mask be drawn together with the image.",
        )
