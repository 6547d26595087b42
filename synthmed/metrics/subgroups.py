"""The same figures for each label: a cohort may serve the many and fail the few."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import HALVES, WORST, Estimate

FEWEST = 10
"""People a side without whom nothing is said of a subgroup, and the least that is ever counted out
in a note: a note may be printed in the report that leaves the house."""

CUTS = 20
"""Parts of a declared range, between which a number may be cut in two."""
People = Mapping[Side, frozenset[str]]


def subgroups(sides: Sides) -> dict[str, People]:
    """`condition=part` to the people of each side whose every known label is in that part.

    A category is a part. Of a number the parts are those up to a value and those above (`HALVES`,
    `cut`). Conditions with one category, and numbers that no value cuts in two, make no subgroups.
    Sides without anybody are left out of the mapping, so that no holdout stays no holdout.
    """
    cases: dict[Side, Cases] = {
        "train": sides.train,
        "holdout": sides.holdout,
        "synthetic": sides.synthetic,
    }
    present = {side: c for side, c in cases.items() if len(c)}
    out: dict[str, People] = {}
    for condition, categories in sides.categorical.items():
        labels = {side: _labels(c, condition) for side, c in present.items()}
        for category in categories if len(categories) > 1 else ():
            out[f"{condition}={category}"] = _all_in(category, labels)
    for condition, (low, high) in sides.continuous.items():
        values = {side: _labels(c, condition) for side, c in present.items()}
        train = values.get("train", {})
        known = [sum(float(v) for v in own) / len(own) for own in train.values()]
        at = cut(known, low, high)
        if at is not None:
            parts = {side: _halves(of, at) for side, of in values.items()}
            for part in HALVES:
                out[f"{condition}={part}"] = _all_in(part, parts)
    return out


def cut(values: Sequence[float], low: float, high: float) -> float | None:
    """The value up to which the lower half of a number is; null where all are on one side of any.

    Of the places that lie twentieths of the declared range apart that which divides the values most
    evenly, the lowest of several. The median would be somebody's own.

    Args:
        values: of the patients of train.
        low: of the declared range.
        high: likewise.
    """
    places = low + (high - low) * np.arange(1, CUTS) / CUTS
    below = np.array([np.sum(np.array(values) <= place) for place in places])
    fewer = np.minimum(below, len(values) - below)
    return float(places[np.argmax(fewer)]) if fewer.max() > 0 else None


def _all_in(part: str, labels: Mapping[Side, Mapping[str, Collection[str | float]]]) -> People:
    """Of each side the patients of whom nothing else is known."""
    return {
        side: frozenset(p for p, own in known.items() if set(own) == {part})
        for side, known in labels.items()
    }


def _halves(
    values: Mapping[str, Collection[str | float]], at: float
) -> dict[str, frozenset[str | float]]:
    """The halves that each patient's values are in."""
    return {
        patient: frozenset(HALVES[float(v) > at] for v in own) for patient, own in values.items()
    }


def too_small(people: People) -> str:
    """Which sides of a subgroup have too few people, never how many; empty where none has."""
    words = {"train": "training", "holdout": "held-out", "synthetic": "synthetic"}
    few = [words[side] for side, p in people.items() if len(p) < FEWEST]
    return f"fewer than {FEWEST} {', '.join(few)}" if few else ""


def tens(n: int) -> int:
    """A number of patients of a subgroup as it may leave the house.

    >>> tens(37), tens(40)
    (30, 40)
    """
    return n // FEWEST * FEWEST


def judged(sides: Sides) -> dict[str, People]:
    """The subgroups that have enough people on every side."""
    return {name: people for name, people in subgroups(sides).items() if not too_small(people)}


def among(shared: Shared, side: Side, people: People) -> Ints:
    """Which rows of a side's features are scans of a subgroup's people, in order."""
    patients = shared.cases(side).patients[shared.scans(side)]
    return np.flatnonzero(np.isin(patients, sorted(people.get(side, ()))))


class Part(Shared):
    """A subgroup of what `Shared` keeps: z-scores stay those of the whole.

    For what compares scans with scans. What was taught by everyone (a reader, a segmenter, an
    attack) is asked about a subgroup by the metric itself.

    Args:
        whole: the caches of the whole.
        name: of the subgroup, for the key.
        people: of each side.
    """

    def __init__(self, whole: Shared, name: str, people: People) -> None:
        sides = replace(whole.sides, key=whole.sides.key.fold("subgroup", name))
        super().__init__(sides, None, whole.false_discovery_rate)
        self._whole, self._people = whole, people
        self._rows: dict[Side, Ints] = {}

    @property
    def has_holdout(self) -> bool:
        return bool(self._people.get("holdout"))

    def counted(self, n: int) -> str:
        """Down to tens: what is told of a subgroup, nobody can take from the whole."""
        return f"{tens(n)} or more"

    def patients(self, side: Side) -> list[Ints]:
        kept = self._kept(side)
        ends = np.cumsum([len(g) for g in kept])
        return [np.arange(end - len(g), end) for g, end in zip(kept, ends, strict=True)]

    def scans(self, side: Side) -> Ints:
        return self._whole.scans(side)[self.rows(side)]

    @property
    def everybody(self) -> Shared:
        return self._whole

    def rows(self, side: Side) -> Ints:
        if side not in self._rows:
            nobody = np.zeros(0, dtype=np.int64)
            self._rows[side] = np.concatenate([nobody, *self._kept(side)])
        return self._rows[side]

    def features(self, side: Side) -> Floats:
        return self._whole.features(side)[self.rows(side)]

    def _kept(self, side: Side) -> list[Ints]:
        names, scans = self._whole.cases(side).patients, self._whole.scans(side)
        own = self._people.get("holdout" if side == "blurred" else side, frozenset())
        return [g for g in self._whole.patients(side) if names[scans[g[0]]] in own]


def worst(
    estimates: Sequence[Estimate], name: str, judged: Sequence[str], left_out: Mapping[str, str]
) -> list[Estimate]:
    """The estimate of the subgroup whose upper bound is the largest share of its ceiling.

    As a slice of its own. Ceilings differ between subgroups, so that bounds alone do not compare;
    one without a ceiling counts as the worst. After it comes a null estimate of every subgroup with
    too few people, so that a policy sees that nobody looked at them.

    The worst is null where there are subgroups and none of them can be judged; nothing is returned
    where there are none.

    Args:
        estimates: all of them.
        name: an estimate that is better the lower it is.
        judged: the slices that are subgroups.
        left_out: subgroups that nothing can be said of, and why.
    """
    told = [f"{part} ({why})" for part, why in left_out.items()]
    few = f"too few people to judge: {', '.join(told)}" if told else ""
    mine = [e for e in estimates if e.name == name and e.slice in judged]
    whole = [e for e in estimates if e.name == name and e.slice is None]
    known = [e for e in mine if e.ci is not None]
    if not known and not (whole and (judged or left_out)):
        return []
    nothing = (known + whole)[0].model_copy(
        update={"value": None, "ci": None, "floor": None, "ceiling": None, "n": 0}
        | {"n_holdout": None}
    )
    unseen = [
        nothing.model_copy(update={"slice": part, "note": why}) for part, why in left_out.items()
    ]
    if known:
        found = max(known, key=_share_of_ceiling)
        note = "; ".join(filter(None, (f"worst of {len(known)}: {found.slice}", few)))
    else:
        found = nothing
        note = "; ".join(filter(None, (*(e.note for e in mine[:1]), few)))
    update = {"slice": WORST, "note": note, "stands_for": (*(e.slice for e in known), *left_out)}
    return [found.model_copy(update=update), *unseen]


def _share_of_ceiling(estimate: Estimate) -> float:
    if estimate.ci is None or not estimate.ceiling or estimate.ceiling <= 0:
        return math.inf
    return estimate.ci[1] / estimate.ceiling


def _labels(cases: Cases, condition: str) -> dict[str, set[str | float]]:
    """The known labels of each patient who has any."""
    seen: dict[str, set[str | float]] = {}
    for patient, labels in zip(cases.patients, cases.labels, strict=True):
        value = labels.get(condition)
        if value is not None:
            seen.setdefault(str(patient), set()).add(value)
    return seen
