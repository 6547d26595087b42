"""copies, copied_patients, copies_shipped: has the model stored people, and do any ship."""

from __future__ import annotations

from typing import Literal

from synthmed.metrics.base import Base
from synthmed.metrics.copies import BY_CHANCE, Copies
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import clopper_pearson
from synthmed.metrics.subgroups import judged, tens
from synthmed.types import Estimate

LEAST_POWER = 0.5
"""Share of exact copies that a test has to see for its silence to count."""


def _sees(found: Copies) -> str:
    """What the test would have found of copies, in a sentence."""
    exact = (
        "an exact copy of a training scan, alone in this cohort, would be found in "
        f"{found.power:.0%} of cases"
    )
    if not found.disguised:
        return exact
    others = "; ".join(f"{name} in {share:.0%}" for name, share in found.disguised.items())
    return f"{exact}; of a few copies in disguise: {others}"


class Copied(Base):
    """The copies test as estimates; lower is better, 0 is attainable.

    - `copies`: share of everything sampled, before the filter, that copies a training patient.
    - `copied_patients`: distinct training patients copied, as a share of training patients. This
      is what a policy judges: a filter hides samples, not what the model has stored.
    - `copies_shipped`: number of samples in the synthetic side that the second similarity, in
      descriptor space, still flags; no value where it would miss most exact copies (`LEAST_POWER`),
      since nothing found then says nothing.

    In a subgroup (slice `NAME=CATEGORY`) `copied_patients` again, as a share of its own training
    patients: what is stored may be stored of the few. Their number is taken down to tens, which
    errs on the safe side, and tells nobody how many there are.

    Intervals are Clopper-Pearson. The upper bound of `copied_patients` is divided by the power of
    the screen (`Copies.power`), at most 1: a test that could not have seen an exact copy bounds
    nothing. The note says what it would have seen of exact copies, and of some in disguise
    (`disguises`). Floor 0; ceiling 1 (all) stands for a model that stores its training set.

    Source: the gap test of `copies.GapTest`.
    """

    name: Literal["copies"] = "copies"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """The three estimates, and the patients of each subgroup."""
        sampled, shipped = shared.as_sampled(), shared.as_shipped()
        n, copied = len(sampled.matches), set(sampled.patients)
        speaks = bool(shipped.flagged) or shipped.power >= LEAST_POWER
        return [
            self._one(
                "copies",
                len(sampled.flagged) / n if n else None,
                clopper_pearson(len(sampled.flagged), n) if n else None,
                "share of samples",
                n,
                1.0,
                sampled,
                sides,
            ),
            self._patients(None, len(sampled.patients), sampled.n_train, sampled, sides),
            self._one(
                "copies_shipped",
                float(len(shipped.flagged)) if speaks else None,
                self._count_interval(shipped) if speaks else None,
                "samples",
                len(shipped.matches),
                float(len(shipped.matches)),
                shipped,
                sides,
            ),
            *(
                self._patients(name, min(len(own & copied), n), n, sampled, sides)
                for name, people in judged(sides).items()
                for own, n in [(people["train"], tens(len(people["train"])))]
            ),
        ]

    def _patients(
        self, where: str | None, copied: int, n_train: int, found: Copies, sides: Sides
    ) -> Estimate:
        """How many of some training patients were copied."""
        low, high = clopper_pearson(copied, n_train)
        high = min(1.0, high / found.power) if found.power > 0 else 1.0
        unit = "share of training patients"
        one = self._one(
            "copied_patients", copied / n_train, (low, high), unit, n_train, 1.0, found, sides
        )
        return one.model_copy(update={"slice": where})

    @staticmethod
    def _count_interval(found: Copies) -> tuple[float, float] | None:
        n = len(found.matches)
        if n == 0:
            return None
        low, high = clopper_pearson(len(found.flagged), n)
        return low * n, high * n

    @staticmethod
    def _one(
        name: str,
        value: float | None,
        ci: tuple[float, float] | None,
        unit: str,
        n: int,
        ceiling: float,
        found: Copies,
        sides: Sides,
    ) -> Estimate:
        against = (
            f"real patients of both sides, {found.n_holdout} held out"
            if found.n_holdout
            else "every real patient against all others (no holdout)"
        )
        space = "descriptor space" if found.similarity == "descriptor" else "images"
        return Estimate(
            name=name,
            group="memorization",
            value=value,
            ci=ci,
            unit=unit,
            n=n,
            better="lower",
            floor=0.0,
            ceiling=ceiling,
            method=(
                f"Gap test in {space} at {found.false_discovery_rate:g} false discovery rate "
                f"({BY_CHANCE:g} for copies of many patients that are rare together), null from "
                f"{against}; ceiling: a model that stores its training set; Clopper-Pearson."
            ),
            seed=sides.seed,
            note=_sees(found),
            n_holdout=found.n_holdout or None,
        )
