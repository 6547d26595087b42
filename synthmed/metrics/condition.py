"""condition_accuracy: is what was asked for what came."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.reader import (
    Names,
    asked,
    correlation,
    first_scans,
    fit,
    left_out,
    patient_weights,
)
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, clopper_pearson, fisher_interval
from synthmed.types import Estimate


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
    own floor, or the worst continuous one where there is no categorical one.

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
        """One a condition and the worst; none when nothing was asked for."""
        if not sides.categorical and not sides.continuous:
            return []
        used: tuple[Side, ...] = ("train", "holdout", "synthetic")
        scans = {side: shared.small(side, self.side) for side in used}
        each = [self._category(c, sides, shared, scans) for c in sides.categorical]
        numbers = [self._number(c, sides, shared, scans) for c in sides.continuous]
        worst = min(each or numbers, key=_shortfall)
        named = f"worst of {len(each or numbers)}: {worst.slice}"
        note = f"{named}; {worst.note}" if worst.note else named
        return [worst.model_copy(update={"slice": None, "note": note}), *each, *numbers]

    def _category(
        self, condition: str, sides: Sides, shared: Shared, scans: dict[Side, Floats]
    ) -> Estimate:
        labels = {side: asked(shared, side, condition) for side in scans}
        known = sorted({str(v) for v in labels["train"] if v is not None})
        rows = {side: [i for i, v in enumerate(labels[side]) if v is not None] for side in scans}
        wanted = sorted({str(labels["synthetic"][i]) for i in rows["synthetic"]})
        reason = ""
        if len(known) < 2:
            reason = "fewer than two categories in train"
        elif not wanted:
            reason = "no synthetic scan was asked for a category"
        if reason:
            return self._one(condition, None, None, "1", 0, None, None, sides, reason, None)
        train = np.array([str(labels["train"][i]) for i in rows["train"]])
        reader = fit(
            scans["train"][rows["train"]],
            train,
            patient_weights(shared, rows["train"]),
            "category",
            self.components,
        )

        def read(side: Side, chosen: list[int]) -> tuple[float, float]:
            truth = np.array([str(labels[side][i]) for i in chosen])
            return balanced(truth, reader.predict(scans[side][chosen]))

        value, effective = read("synthetic", rows["synthetic"])
        floor = None
        one_each = first_scans(shared, rows["holdout"])
        if one_each:
            floor = read("holdout", one_each)[0]
        missing = [c for c in wanted if c not in known]
        never = [c for c in sides.categorical[condition] if c not in wanted]
        notes = []
        if floor is None:
            notes.append("no held-out patients: no floor")
        if missing:
            notes.append(f"not in train, so never recognised: {', '.join(missing)}")
        if never:
            notes.append(f"not asked for: {', '.join(never)}")
        notes += left_out(labels)
        return self._one(
            condition,
            value,
            clopper_pearson(value * effective, effective),
            "1",
            len(rows["synthetic"]),
            floor,
            1 / len(known),
            sides,
            "; ".join(notes),
            len(one_each) or None,
        )

    def _number(
        self, condition: str, sides: Sides, shared: Shared, scans: dict[Side, Floats]
    ) -> Estimate:
        labels = {side: asked(shared, side, condition) for side in scans}
        rows = {side: [i for i, v in enumerate(labels[side]) if v is not None] for side in scans}
        truth = {side: np.array([float(labels[side][i] or 0) for i in rows[side]]) for side in rows}
        if any(len(truth[s]) < 3 or np.ptp(truth[s]) == 0 for s in ("train", "synthetic")):
            reason = "fewer than three values, or all equal, in train or in what was asked for"
            return self._one(condition, None, None, "r", 0, None, 0.0, sides, reason, None)
        reader = fit(
            scans["train"][rows["train"]],
            truth["train"],
            patient_weights(shared, rows["train"]),
            "number",
            self.components,
        )
        value = correlation(
            truth["synthetic"], reader.predict(scans["synthetic"][rows["synthetic"]])
        )
        one_each = first_scans(shared, rows["holdout"])
        floor = None
        if len(one_each) >= 3:
            real = np.array([float(labels["holdout"][i] or 0) for i in one_each])
            floor = correlation(real, reader.predict(scans["holdout"][one_each]))
        n = len(rows["synthetic"])
        notes = [] if floor is not None else ["fewer than three held-out patients: no floor"]
        return self._one(
            condition,
            value,
            fisher_interval(value, n),
            "r",
            n,
            floor,
            0.0,
            sides,
            "; ".join(notes + left_out(labels)),
            len(one_each) or None,
        )

    @staticmethod
    def _one(
        condition: str,
        value: float | None,
        ci: tuple[float, float] | None,
        unit: str,
        n: int,
        floor: float | None,
        ceiling: float | None,
        sides: Sides,
        note: str,
        n_holdout: int | None,
    ) -> Estimate:
        how = (
            "Pearson r of asked and read values, ridge regression on real train; ceiling: 0, no "
            "relation; Fisher interval"
            if unit == "r"
            else "Share of samples read as the category asked for (balanced), logistic regression "
            "on real train; ceiling: guessing; Clopper-Pearson"
        )
        return Estimate(
            name="condition_accuracy",
            group="fidelity",
            slice=f"condition={condition}",
            value=value,
            ci=ci,
            unit=unit,
            n=n,
            better="higher",
            floor=floor,
            ceiling=ceiling,
            method=f"{how}; floor: the same reader on held-out patients.",
            seed=sides.seed,
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
