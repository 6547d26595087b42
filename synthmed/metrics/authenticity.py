"""authenticity: do samples keep the distance from patients that patients keep from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from synthmed.metrics.base import Base
from synthmed.metrics.shared import Shared, Side, pick
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, clopper_pearson, half, half_se, normal_interval
from synthmed.types import Estimate

FEWEST_TRAIN, FEWEST_OTHERS = 6, 4
"""Patients of train, and of another side, whose halves can still say how much a share varies."""


class Authenticity(Base):
    """Share of samples farther from their nearest training patient than that patient's neighbour.

    Sample y with nearest training patient x is authentic when |y - x| > |x - x'|, x' the nearest
    other training patient of x; distances between z-scored descriptors, one scan a patient.
    Near-copies go to 0. Sharing x between samples is respected: intervals come from halves of the
    patients of every side; where all of these say none, or all, the exact bound is left.

    - `authenticity`: of the samples. Higher is better up to the floor, the share among held-out
      patients posing as samples (about a half for honest ones); its interval is in the note.
      Ceiling 0: train itself posing as samples.
    - `authenticity_excess`: authenticity less its floor, both on the same halves of train, so that
      the chance in either is in the interval. Below 0, the floor, samples are nearer to training
      patients than other people are. Ceiling: train itself.

    In a subgroup, samples and patients are its own: those whom a sample of it could be taken from.

    Args:
        draws: picks of one scan a patient that the figures are averaged over.

    Source: Alaa et al. 2022, section 4.3 (in the nearest-neighbour form of synthcity).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["authenticity"] = "authenticity"
    draws: int = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """Both estimates; null with fewer than three training patients or no sample.

        The excess is null too where it has no interval: it is there to be judged by it.
        """
        made = real = excess = None
        if len(shared.patients("train")) >= 3 and len(shared.patients("synthetic")) >= 1:
            made = self._share(sides, shared, "synthetic")
            if shared.has_holdout:
                real = self._share(sides, shared, "holdout")
                excess = made.less(real)
        note, no_excess = _notes(made, real, excess)
        authenticity = Estimate(
            name="authenticity",
            group="memorization",
            value=made.value if made else None,
            ci=made.ci if made else None,
            unit="share of samples",
            n=len(shared.patients("synthetic")),
            better="higher",
            floor=real.value if real else None,
            ceiling=0.0,
            method=(
                "Share of samples farther from their nearest training patient than that "
                "patient's nearest neighbour, in descriptors; floor: held-out patients posing "
                "as samples; ceiling: exact copies; interval from halves of the patients."
            ),
            seed=sides.seed,
            note=note,
            n_holdout=shared.n_holdout,
        )
        beyond = authenticity.model_copy(
            update={
                "name": "authenticity_excess",
                "value": excess.value if excess else None,
                "ci": excess.ci if excess else None,
                "floor": 0.0 if real else None,
                "ceiling": -real.value if real else None,
                "method": (
                    "authenticity of the synthetic cohort minus that of held-out patients posing "
                    "as samples; ceiling: exact copies; interval from the same halves of patients."
                ),
                "note": no_excess,
            }
        )
        return [authenticity, beyond]

    def _share(self, sides: Sides, shared: Shared, side: Side) -> _Share:
        train, made = shared.patients("train"), shared.patients(side)
        to_train, within = shared.distances(side, "train"), shared.distances("train", "train")
        # one key of train for all sides: a difference of two of them is paired
        key = sides.key.fold("authenticity")

        def shares(n: int, label: str, *, halved: bool) -> Floats:
            found = np.empty(n)
            for i in range(n):
                of_train = key.fold(label, "train", i).numpy()
                of_side = key.fold(label, side, i).numpy()
                a, b = train, made
                if halved:
                    a = [train[j] for j in half(len(train), of_train)]
                    b = [made[j] for j in half(len(made), of_side)]
                x, y = pick(a, of_train), pick(b, of_side)
                found[i] = authentic_share(to_train[np.ix_(y, x)], within[np.ix_(x, x)])
            return found

        enough = len(made) >= FEWEST_OTHERS and len(train) >= FEWEST_TRAIN
        return _Share(
            float(shares(self.draws, "value", halved=False).mean()),
            shares(sides.resamples, "half", halved=True) if enough else None,
            clopper_pearson(0, min(len(made), len(train)))[1],
        )


@dataclass(frozen=True)
class _Share:
    """A share, or a difference of two, with its values on halves of the patients.

    Args:
        value: of all of them.
        halves: of each half; null where halves are too small.
        gap: how far from none or from all it may be where no half differs: the bound of Clopper
            and Pearson for none of the smaller side's patients, of a difference that of both.
        low: the smallest that it can be.
    """

    value: float
    halves: Floats | None
    gap: float
    low: float = 0.0

    @property
    def ci(self) -> tuple[float, float] | None:
        """95 % interval; null where halves are too small."""
        if self.halves is None:
            return None
        return normal_interval(self.value, half_se(self.halves), self.low, 1.0, self.gap)

    def less(self, other: _Share) -> _Share | None:
        """This less the other on the same halves of train; null without either's halves."""
        if self.halves is None or other.halves is None:
            return None
        halves, gap = self.halves - other.halves, self.gap + other.gap
        return _Share(self.value - other.value, halves, gap, -1.0)


def _notes(made: _Share | None, real: _Share | None, excess: _Share | None) -> tuple[str, str]:
    """What is missing of either estimate and why; of the first, else the floor's interval."""
    if made is None:
        reason = "fewer than three training patients, or no sample"
        return reason, reason
    if real is None:
        reason = "no held-out patients: no floor"
        return reason, reason
    note = "too few held-out patients for an interval of the floor"
    if real.ci is not None:
        note = f"held-out patients: {real.ci[0]:.2f} to {real.ci[1]:.2f}"
    if excess is not None:
        return note, ""
    return note, (
        f"no interval with fewer than {FEWEST_TRAIN} training patients, or {FEWEST_OTHERS} "
        "held-out patients or samples"
    )


def authentic_share(to_train: Floats, within: Floats) -> float:
    """The share from distances (n_samples, n_train) and (n_train, n_train)."""
    neighbour = within.copy()
    np.fill_diagonal(neighbour, np.inf)
    nearest = np.argmin(to_train, axis=1)
    return float(np.mean(to_train.min(axis=1) > neighbour.min(axis=1)[nearest]))
