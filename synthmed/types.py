"""The nouns that pass between stages: labels, estimates, verdicts.

Axes: B batch, S scans of a patient, C channels, X Y Z voxels (RAS+: X to the right, Y to the
front, Z to the top), D encoded condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
Labels = Mapping[str, str | float]
"""Condition name to value: a category (str) or a number (float, in the condition's unit)."""


class Frozen(BaseModel):
    """A record that cannot be changed and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Frozen):
    """One measured figure with everything needed to judge it.

    Args:
        name: the metric, as in the contract (`mmd2`, `copies`, ...).
        group: what it speaks of.
        slice: the subgroup or condition it is restricted to, null for the whole cohort.
        value: the point estimate; null when it cannot be computed (`note` says why).
        ci: 95 % interval [low, high], null with a reason in `note`.
        unit: of `value`, "1" when dimensionless.
        n: number of patients (or samples, as `method` says) behind it.
        better: the direction that is better; "match" means close to `target`.
        target: the ideal value when `better` is "match".
        floor: the best attainable on this cohort, whatever the direction.
        ceiling: a known-bad control's value, named in `method`.
        method: how it was computed, one sentence.
        seed: of the resampling behind the interval.
        note: why something is null, or what limits the figure.
        n_holdout: held-out patients behind it; null where the holdout plays no part.
        stands_for: slices that it is the worst of, by one number. What is the worst depends on what
            is asked, so a rule on it is asked of each.
    """

    name: str
    group: Literal["fidelity", "memorization", "membership", "utility", "audit"]
    slice: str | None = None
    value: float | None
    ci: tuple[float, float] | None
    unit: str = "1"
    n: int
    better: Literal["lower", "higher", "match"]
    target: float | None = None
    floor: float | None
    ceiling: float | None
    method: str
    seed: int
    note: str = ""
    n_holdout: int | None = None
    stands_for: tuple[str, ...] = ()


class Verdict(Frozen):
    """What a policy rule says of an estimate; `reason` is a sentence a data manager reads."""

    estimate: str
    slice: str | None
    rule: str
    status: Literal["pass", "review", "fail", "inconclusive"]
    reason: str


WORST = "worst subgroup"
"""Slice of the estimate of the subgroup that it is worst in, which a policy can ask about."""

HALVES = ("lower half", "upper half")
"""What stands for the categories of a number where subgroups are made: those up to about the median
of the patients to train on, and those above."""

COPIES_THAT_SHIP = "flagged samples that ship"
"""The line of a decision that is there only if there are any."""


class Decision(Frozen):
    """The outcome of a policy: about this policy alone, never "anonymous"."""

    decision: Literal["RELEASE", "REVIEW", "WITHHELD"]
    reasons: Sequence[str]
    verdicts: Sequence[Verdict]
