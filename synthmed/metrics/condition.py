"""condition_accuracy: is what was asked for what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base, leading, of_subgroup
from synthmed.metrics.reader import (
    Kind,
    Names,
    as_array,
    asked,
    correlation,
    first_scans,
    fit,
    left_out,
    patient_weights,
)
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints, clopper_pearson, fisher_interval
from synthmed.metrics.subgroups import among, judged
from synthmed.types import Estimate

ASKED: tuple[Side, ...] = ("holdout", "synthetic")
USED: tuple[Side, ...] = ("train", *ASKED)


class ConditionAccuracy(Base):
    """A reader trained on real train, asked what the synthetic scans show; higher is better.

    Scans are averaged to at most `side` voxels a side, standardised, reduced by PCA and read by
    logistic regression (a category) or ridge regression (a number); every patient of train weighs
    one. Scans whose label is not known are left out, on every side, and the note says so.

    - A category: mean over the categories asked for of the share recognised (balanced accuracy).
      Interval: Clopper-Pearson at the effective count C^2 / sum 1/n_c, which is n for equal
      counts. Ceiling: one over the number of categories in train, what guessing reaches.
    - A number: Pearson r between what was asked and what is read; Fisher's interval. Ceiling 0.

    Floor: the same reader on the holdout, one scan a patient: synthetic scans cannot be expected
    to be read better (they may be, when they exaggerate). One estimate a condition with slice
    `condition=NAME`, and one with slice null: the categorical condition that is worst against its
    own floor, or the worst continuous one where there is no categorical one. Again the worst for
    each subgroup (slice `NAME=CATEGORY`): the same readers, asked about its own samples and
    held-out patients; of the label that makes the subgroup, the share recognised as that category.

    Args:
        side: voxels a side that the reader sees.
        components: principal components at most; also at most a third of the scans of train.

    Source: Ravuri and Vinyals 2019 (classification accuracy score, here train real, test
    synthetic); effective counts: Korn and Graubard 1998.
    """

    name: Literal["condition_accuracy"] = "condition_accuracy"
    side: Annotated[int, Field(ge=4, le=32)] = 12
    components: Annotated[int, Field(ge=2)] = 40

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One a condition and the worst, and the worst of each subgroup; none without labels."""
        if not sides.categorical and not sides.continuous:
            return []
        scans = {side: shared.small(side, self.side) for side in USED}
        readers = [self._teach(c, "category", shared, scans) for c in sides.categorical]
        readers += [self._teach(c, "number", shared, scans) for c in sides.continuous]
        everyone = {side: np.arange(len(scans[side])) for side in ASKED}

        def ask(rows: Mapping[Side, Ints]) -> list[Estimate]:
            """The worst of all readers, then each."""
            each = [r.ask(rows, scans, shared) for r in readers]
            alike = each[: len(sides.categorical) or len(each)]
            return [leading(min(alike, key=_shortfall), alike), *each]

        out = ask(everyone)
        for name, people in judged(sides).items():
            part = ask({side: among(shared, side, people) for side in ASKED})[0]
            out.append(of_subgroup(part, name))
        return out

    def _teach(
        self, condition: str, kind: Kind, shared: Shared, scans: Mapping[Side, Floats]
    ) -> Reader:
        """Taught by everybody of train whose label is known."""
        labels = {side: asked(shared, side, condition) for side in USED}
        rows = [i for i, v in enumerate(labels["train"]) if v is not None]
        truth = as_array([labels["train"][i] for i in rows], kind)
        if kind == "category" and len(set(truth)) < 2:
            return Reader(condition, kind, labels, truth, "fewer than two categories in train")
        if kind == "number" and (len(truth) < 3 or np.ptp(truth) == 0):
            few = "fewer than three values, or all equal, in train"
            return Reader(condition, kind, labels, truth, few)
        weights = patient_weights(shared, rows)
        taught = fit(scans["train"][rows], truth, weights, kind, self.components)
        return Reader(condition, kind, labels, truth, taught=taught)


@dataclass(frozen=True)
class Reader:
    """What reads one condition, and the labels that it is held against.

    Args:
        condition: its name.
        kind: of the condition.
        labels: of every scan of a side, null where it is not known.
        truth: what it was taught, category or number a scan.
        reason: why it could not be taught; else empty.
        taught: the fitted pipeline; null with a reason.
    """

    condition: str
    kind: Kind
    labels: Mapping[Side, Sequence[str | float | None]]
    truth: Any
    reason: str = ""
    taught: Any = None

    def ask(
        self, rows: Mapping[Side, Ints], scans: Mapping[Side, Floats], shared: Shared
    ) -> Estimate:
        """Its estimate on some rows of the sides that are asked about.

        Args:
            rows: of these sides, everybody's or those of a subgroup.
            scans: what it sees of every scan of a side.
            shared: the sides.
        """
        known = {
            side: [int(i) for i in rows[side] if self.labels[side][i] is not None] for side in ASKED
        }
        one_each = first_scans(shared, known["holdout"])
        truth = as_array([self.labels["synthetic"][i] for i in known["synthetic"]], self.kind)
        real = as_array([self.labels["holdout"][i] for i in one_each], self.kind)
        reason = self.reason or self._unasked(truth)
        if reason:
            return self._one(None, None, 0, None, shared.sides.seed, reason, None)
        made = self.taught.predict(scans["synthetic"][known["synthetic"]])
        held = self.taught.predict(scans["holdout"][one_each]) if one_each else real
        n = len(truth)
        floor = ci = None
        if self.kind == "category":
            value, effective = balanced(truth, made)
            ci = clopper_pearson(value * effective, effective)
            if one_each:
                floor = balanced(real, held)[0]
            notes = [] if one_each else ["no held-out patients: no floor"]
            notes += self._strangers(truth, shared.sides)
        else:
            value = correlation(truth, made)
            ci = fisher_interval(value, n)
            if len(one_each) >= 3:
                floor = correlation(real, held)
            notes = [] if floor is not None else ["fewer than three held-out patients: no floor"]
        notes += left_out(self.labels)
        n_holdout = len(one_each) or None
        return self._one(value, ci, n, floor, shared.sides.seed, "; ".join(notes), n_holdout)

    def _unasked(self, truth: Any) -> str:
        """Why nothing can be said of what was asked for; empty where it can."""
        if self.kind == "category":
            return "" if len(truth) else "no synthetic scan was asked for a category"
        few = len(truth) < 3 or np.ptp(truth) == 0
        return "fewer than three values, or all equal, in what was asked for" if few else ""

    def _strangers(self, truth: Names, sides: Sides) -> list[str]:
        """Categories that cannot be recognised, and those of which the cohort has nobody."""
        missing = sorted(set(truth) - set(self.truth))
        wanted = {v for v in self.labels["synthetic"] if v is not None}
        never = [c for c in sides.categorical[self.condition] if c not in wanted]
        notes = [f"not in train, so never recognised: {', '.join(missing)}"] if missing else []
        return notes + ([f"not asked for: {', '.join(never)}"] if never else [])

    def _one(
        self,
        value: float | None,
        ci: tuple[float, float] | None,
        n: int,
        floor: float | None,
        seed: int,
        note: str,
        n_holdout: int | None,
    ) -> Estimate:
        if self.kind == "category":
            ceiling = 1 / len(set(self.truth)) if value is not None else None
            unit = "1"
            how = (
                "Share of samples read as the category asked for (balanced), logistic regression "
                "on real train; ceiling: guessing; Clopper-Pearson"
            )
        else:
            ceiling, unit = 0.0, "r"
            how = (
                "Pearson r of asked and read values, ridge regression on real train; ceiling: 0, "
                "no relation; Fisher interval"
            )
        return Estimate(
            name="condition_accuracy",
            group="fidelity",
            slice=f"condition={self.condition}",
            value=value,
            ci=ci,
            unit=unit,
            n=n,
            better="higher",
            floor=floor,
            ceiling=ceiling,
            method=f"{how}; floor: the same reader on held-out patients.",
            seed=seed,
            note=note,
            n_holdout=n_holdout,
        )


def balanced(truth: Names, read: Names) -> tuple[float, float]:
    """Mean over categories of the share read correctly, and its effective count."""
    categories, counts = np.unique(truth, return_counts=True)
    shares = [float(np.mean(read[truth == c] == c)) for c in categories]
    return float(np.mean(shares)), float(len(counts) ** 2 / np.sum(1 / counts))


def _shortfall(estimate: Estimate) -> float:
    """How far a condition is below what real scans reach; nothing readable is the worst."""
    if estimate.value is None:
        return -np.inf
    return estimate.value - (estimate.floor if estimate.floor is not None else 1.0)
