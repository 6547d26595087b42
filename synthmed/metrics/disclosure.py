"""singling_out, linkability, attribute_inference: the three questions of Opinion 05/2014."""

from __future__ import annotations

from typing import Literal

from synthmed.metrics.base import Base, leading
from synthmed.metrics.inference import inference
from synthmed.metrics.linkability import linkability
from synthmed.metrics.records import Targets, targets
from synthmed.metrics.risk import Outcome, risk
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.singling_out import singling_out
from synthmed.types import Estimate

FEWEST = 3
"""People on a real side, and samples, without whom no attack is made."""

METHODS = {
    "singling_out": "Descriptions read off the samples that fit exactly one of so many people",
    "linkability": "Labels with the upper half of the image, and its lower half, that lead to one "
    "sample",
    "attribute_inference": "Label of the sample with the nearest image (a number within a tenth of "
    "its range)",
}
ASKED = {
    "singling_out": "descriptions fit one person alone",
    "linkability": "patients are linked",
    "attribute_inference": "labels are found",
}


class Disclosure(Base):
    """Singling out, linkability and inference from the cohort; lower is better.

    Three attacks on records of labels and image components (`records`), each made on training
    patients, on held-out ones as a control, and by guessing. The figure of each is the risk
    (train - control) / (1 - control) with its interval (`risk.risk`): what the cohort tells of the
    people it was made from, beyond what it tells of people as such. Floor 0; ceiling: the same
    attack on a cohort of copies of train.

    - `singling_out`: descriptions that fit one person alone (`singling_out.singling_out`).
    - `linkability`: two halves of a record found to belong together (`linkability.linkability`).
    - `attribute_inference`: a label guessed from the image (`inference.inference`). Slice
      `condition=NAME` for each condition; slice null: the one whose upper bound is the highest.

    An attack that does no better than guessing even on training patients is called weak in the
    note. It is then its ceiling that says whether it would have found anything.

    Source: Article 29 Working Party, Opinion 05/2014 on Anonymisation Techniques (WP216); Giomi et
    al. 2023, PoPETs 2023(2):312.
    """

    name: Literal["disclosure"] = "disclosure"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """All figures; null without three people and samples a side, inference without labels."""
        names = [*sides.categorical, *sides.continuous]
        found, why = self._tables(shared, "synthetic")
        copies, _ = self._tables(shared, "train")
        if found is None or copies is None:
            why = why or "all training scans are alike"
            lines = ["singling_out", "linkability", *(["attribute_inference"] if names else [])]
            return [self._one(name, None, None, None, why, sides, shared) for name in lines]
        key = sides.key.fold("disclosure", "descriptions")
        out = [
            self._one(
                "singling_out",
                None,
                singling_out(found, key.numpy()),
                singling_out(copies, key.numpy()),
                "",
                sides,
                shared,
            ),
            self._one(
                "linkability", None, linkability(found), linkability(copies), "", sides, shared
            ),
        ]
        told = []
        for name in names:
            parts = inference(found, name), inference(copies, name)
            why = "fewer than three known labels on a side"
            where = f"condition={name}"
            told.append(self._one("attribute_inference", where, *parts, why, sides, shared))
        if told:
            out.append(leading(max(told, key=_badness), told))
        return out + told

    @staticmethod
    def _tables(shared: Shared, cohort: Side) -> tuple[Targets | None, str]:
        """The tables when a side is attacked, or why there are none."""
        if not shared.has_holdout:
            return None, "no held-out patients, and so no control"
        used: tuple[Side, ...] = ("train", "holdout", "synthetic")
        if min(len(shared.patients(side)) for side in used) < FEWEST:
            return None, "fewer than three patients or samples on a side"
        tables = targets(shared, cohort)
        return tables, "" if tables else "the scans, or halves of them, are all alike"

    @staticmethod
    def _one(
        name: str,
        where: str | None,
        found: Outcome | None,
        copies: Outcome | None,
        why: str,
        sides: Sides,
        shared: Shared,
    ) -> Estimate:
        figure = None if found is None else risk(found)
        stored = None if copies is None else risk(copies)
        note = why
        if found is not None:
            note = (
                f"{ASKED[name]} in {found.train.value:.1%} of cases among training patients, "
                f"{found.control.value:.1%} among held-out ones, {found.baseline:.1%} by guessing"
            )
            if figure is None:
                note += "; the attack succeeds on every held-out patient: no risk can be told apart"
            elif found.is_weak:
                note += (
                    "; no better than guessing even on training patients: too weak to tell, "
                    "unless the ceiling shows what it finds in a cohort of copies"
                )
            if stored is None:
                note += "; no ceiling: on copies the attack succeeds on every held-out patient"
        return Estimate(
            name=name,
            group="memorization",
            slice=where,
            value=None if figure is None else figure[0],
            ci=None if figure is None else figure[1],
            n=found.n_train if found else len(shared.patients("train")),
            better="lower",
            floor=0.0,
            ceiling=None if stored is None else stored[0],
            method=f"{METHODS[name]}: success on training patients less that on held-out ones, "
            "over 1 less the latter; ceiling: the training set as samples; ratio interval from "
            "the Wilson intervals of both (MOVER).",
            seed=sides.seed,
            note=note,
            n_holdout=found.n_control if found else None,
        )


def _badness(e: Estimate) -> tuple[float, ...]:
    """The upper bound; of equal ones the higher value, then the one that is surer."""
    if e.value is None or e.ci is None:
        return (float("-inf"),)
    return e.ci[1], e.value, e.ci[0]
