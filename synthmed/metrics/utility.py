"""auc_*, r_*: does a model of the label learn from the cohort what it would learn from patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from synthmed.keys import Key
from synthmed.metrics.base import Base
from synthmed.metrics.blocks import smallest
from synthmed.metrics.reader import (
    Kind,
    as_array,
    asked,
    first_scans,
    fit,
    left_out,
    patient_weights,
)
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Bools, Floats, Ints, wins
from synthmed.metrics.subgroups import FEWEST, People, judged
from synthmed.metrics.taught import (
    CURVE_WAYS,
    WAYS,
    altered,
    copies,
    copy_weight,
    counts,
    draw,
    draws,
    estimates,
    names,
    numbered,
    of,
    one,
    over_lessons,
)
from synthmed.types import Estimate

SMALLEST_CLASS = 3
"""Held-out patients of a category without whom it cannot be asked about; `FEWEST` without whom it
is not judged."""


class Utility(Base):
    """A reader of a label, taught by real and by synthetic scans, tested on held-out patients.

    Scans are averaged to at most `side` voxels a side and read as by `condition_accuracy`. For a
    category the figure is the AUC of one against the rest, averaged over the categories; for a
    number, Pearson's r (names then begin with `r_`). Higher is better.

    - `auc_trtr`: taught by real train. The floor of all that follow.
    - `auc_tstr`: taught by the synthetic scans, with the labels they were asked for.
    - `auc_augmented`: taught by both, each scan weighing the same.
    - `auc_classical_augmentation`: taught by real train and altered copies of it (moved, turned,
      brightened), which together weigh as much as the synthetic scans. What a cohort has to beat.
    - `auc_tstr_minus_trtr`, `auc_augmented_minus_trtr`, `auc_augmented_minus_classical`:
      differences on the same patients, with paired intervals. Floor 0; ceiling: guessing, less
      the yardstick.

    Slice `condition=NAME` for each condition. Slice null: the condition (a category, where there is
    one) whose `tstr` may fall furthest short, by the lower end of its interval, as a policy asks;
    one without an interval before all others. Slice `condition=NAME, N patients`: the learning
    curve. Its real part is N patients of train, drawn evenly over the categories, `draws` times;
    the cohort learned from them and from all others, as one that a larger hospital shares would.
    Slice `NAME=CATEGORY`: a subgroup, of whose held-out patients the same readers are asked, with
    the condition that may fall furthest short there; of the label that makes the subgroup, the AUC
    of its category against the rest.

    Intervals: bootstrap of the held-out patients within their categories, widened where it has no
    spread, and by Student's t for the smallest category (`taught.interval`). On the curve who was
    drawn to teach is resampled too (`over_lessons`); that other patients than train would have
    taught another reader is in none of them. With fewer than ten patients of a category that train
    knows (or values of a number) they say little: slice null and subgroups, which are there to be
    judged, then have no value, and slices of the condition say it in their notes.

    Args:
        side: voxels a side that the reader sees.
        components: principal components at most; also at most a third of the scans.
        draws: of the patients behind each point of the curve.
        flip: whether the altered copies may be mirrored: only where the anatomy is symmetric and no
            label has a side.

    Source: Esteban, Hyland and Rätsch 2017, arXiv:1706.02633 (TSTR, TRTS).
    """

    name: Literal["utility"] = "utility"
    side: Annotated[int, Field(ge=4, le=32)] = 12
    components: Annotated[int, Field(ge=2)] = 40
    draws: Annotated[int, Field(ge=1)] = 3
    flip: bool = False

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """All conditions and the one that falls shortest; none when nothing was asked for.

        Again the one that falls shortest in each subgroup.
        """
        if not sides.categorical and not sides.continuous:
            return []
        scans = self._scans(shared) if shared.has_holdout else None
        conditions = (*sides.categorical, *sides.continuous)
        groups = judged(sides) if scans is not None else {}
        found = {c: self._condition(c, sides, shared, scans, groups) for c in conditions}

        def leading(own: Mapping[str, Sequence[Estimate]], name: str | None) -> list[Estimate]:
            """The condition that falls shortest, as slice `name`.

            Of everybody one that cannot be asked about is the shortest; in a subgroup, where
            another label may well be rare, only if none can.
            """
            able = [c for c in sides.categorical or sides.continuous if own[c]]
            if not able:
                return []
            mute = [c for c in able if name and own[c][0].value is None]
            told = [c for c in able if c not in mute] or able
            worst = min(told, key=lambda c: _shortfall(own[c]))
            mute = [c for c in mute if c != worst]
            said = f"condition={worst}" + (f"; not asked about: {', '.join(mute)}" if mute else "")
            # those with too few people to be judged by have slices all the same
            parts = tuple(f"condition={c}" for c in able if name is None and own[c][0].ci)
            notes = ["; ".join(filter(None, (said, e.note))) for e in own[worst]]
            return [
                e.model_copy(update={"slice": name, "note": note, "stands_for": parts})
                for e, note in zip(own[worst], notes, strict=True)
            ]

        out = leading({c: found[c].judged for c in conditions}, None)
        out += [e for c in conditions for e in found[c].slices if e.slice not in groups]
        for name in groups:
            own = {c: [e for e in found[c].slices if e.slice == name] for c in conditions}
            out += leading(own, name)
        return out

    def _scans(self, shared: Shared) -> dict[str, Floats]:
        """What a reader sees of every side, and of altered copies of train, copy after copy."""
        used: tuple[Side, ...] = ("train", "holdout", "synthetic")
        scans = {str(side): shared.small(side, self.side) for side in used}
        times = copies(len(scans["train"]), len(scans["synthetic"]))
        grid = shared.small_grid(self.side)
        rows = [
            smallest(altered(block, first, shared.sides, copy, self.flip), grid)
            for copy in range(times)
            for first, block in numbered(shared)
        ]
        return {**scans, "altered": np.concatenate([scans["train"][:0], *rows])}

    def _condition(
        self,
        condition: str,
        sides: Sides,
        shared: Shared,
        scans: Mapping[str, Floats] | None,
        groups: Mapping[str, People],
    ) -> _Found:
        kind: Kind = "category" if condition in sides.categorical else "number"
        used: tuple[Side, ...] = ("train", "holdout", "synthetic")
        labels = {side: asked(shared, side, condition) for side in used}
        rows = {side: [i for i, v in enumerate(labels[side]) if v is not None] for side in used}
        test = first_scans(shared, rows["holdout"]) if scans is not None else []
        truth = {side: as_array([labels[side][i] for i in rows[side]], kind) for side in used}
        known = as_array([labels["holdout"][i] for i in test], kind)
        reason = "no held-out patients" if scans is None else _reason(kind, truth, known)
        n = len(shared.patients("synthetic"))
        whole = f"condition={condition}"
        start = "auc" if kind == "category" else "r"

        def nothing(why: str) -> list[Estimate]:
            none = (None, None, None, None)
            return [one(name, whole, *none, n, sides, why, None) for name in names(start)]

        if scans is None or reason:
            return _Found(nothing(reason), nothing(reason))
        key = sides.key.fold("utility", condition)
        judge = Judge(known, kind, sides.resamples, key.fold("test").numpy())
        weight = patient_weights(shared, rows["train"])
        person = sides.train.patients[shared.scans("train")[rows["train"]]]
        x = scans["train"][rows["train"]]
        made = scans["synthetic"][rows["synthetic"]]
        times = len(scans["altered"]) // len(scans["train"])

        def taught(kept: Ints, way: str) -> Floats:
            """What a reader says of the held-out patients, taught with some rows of train."""
            parts = []
            if way != "tstr":
                parts.append((x[kept], truth["train"][kept], weight[kept]))
            if way in ("tstr", "augmented"):
                parts.append((made, truth["synthetic"], np.ones(len(made))))
            if way == "classical_augmentation":
                w = copy_weight(len(made), weight[kept], times) * weight[kept]
                for copy in range(times):
                    at = copy * len(scans["train"]) + np.array(rows["train"])[kept]
                    parts.append((scans["altered"][at], truth["train"][kept], w))
            a, b, weights = (np.concatenate(c) for c in zip(*parts, strict=True))
            return scored(fit(a, b, weights, kind, self.components), scans["holdout"][test], judge)

        everyone = np.arange(len(x))
        said = {way: taught(everyone, way) for way in WAYS}
        figures = {way: judge.figures(s) for way, s in said.items()}
        few = _untestable(kind, known, FEWEST, truth["train"])
        notes = "; ".join(filter(None, (few, *left_out(labels))))
        out = estimates(start, whole, figures, judge, n, sides, notes, len(test))
        judged = nothing(few) if few else list(out)
        patients = sides.holdout.patients[shared.scans("holdout")[test]]
        for name, people in groups.items():
            own = np.isin(patients, sorted(people["holdout"]))
            out += _of_subgroup(name, own, condition, judge, said, n, sides, notes, key)
        for count in counts(len(set(person))):
            picks = [
                of(person, draw(person, truth["train"], kind, count, key.fold("curve", count, d)))
                for d in range(self.draws)
            ]
            again = key.fold("curve", count, "again")
            part = {
                way: over_lessons([judge.figures(taught(pick, way)) for pick in picks], again)
                for way in CURVE_WAYS
            }
            where = f"{whole}, {count} patients"
            out += estimates(start, where, part, judge, n, sides, notes, len(test))
        return _Found(out, judged)


class _Found(NamedTuple):
    """What was found of a condition: its slices, and what a judgement of the whole may rest on."""

    slices: Sequence[Estimate]
    judged: Sequence[Estimate]


class Judge:
    """Figures of readers on held-out patients, as they are and resampled, the same for each reader.

    Args:
        truth: (n,) categories or numbers.
        kind: of the condition.
        times: bootstrap draws of patients, within their categories.
        rng: draws them.
        asked: the categories that are told from the rest; by default all.
    """

    def __init__(
        self,
        truth: Any,
        kind: Kind,
        times: int,
        rng: np.random.Generator,
        asked: Sequence[str] | None = None,
    ) -> None:
        self.truth, self.kind = truth, kind
        self.categories: list[str] = sorted(set(truth)) if kind == "category" else []
        self.asked = self.categories if asked is None else asked
        n = len(truth)
        groups = [np.nonzero(truth == c)[0] for c in self.categories] or [np.arange(n)]
        self.weights = draws(n, times, groups, rng)

    @property
    def smallest(self) -> int:
        """People of the smallest category; of a number all."""
        sizes = [int(np.sum(self.truth == c)) for c in self.categories] or [len(self.truth)]
        return min(sizes)

    @property
    def guess(self) -> float:
        """The figure of a reader that knows nothing."""
        return 0.5 if self.kind == "category" else 0.0

    @property
    def least(self) -> float:
        """The smallest that a figure can be."""
        return 0.0 if self.kind == "category" else -1.0

    def figures(self, said: Floats) -> Floats:
        """(1 + times,) figures of a reader; the first is of the patients as they are.

        Args:
            said: (n, categories) scores or (n, 1) numbers.
        """
        if self.kind == "number":
            return self._correlations(said[:, 0])
        each = []
        for category in self.asked:
            own, k = self.truth == category, self.categories.index(category)
            won = wins(said[own, k], said[~own, k])
            a, b = self.weights[:, own], self.weights[:, ~own]
            each.append(np.sum((a @ won) * b, axis=1) / (a.sum(axis=1) * b.sum(axis=1)))
        return np.asarray(np.mean(each, axis=0))

    def _correlations(self, said: Floats) -> Floats:
        w = self.weights / self.weights.sum(axis=1, keepdims=True)
        x, y = (v - (w @ v)[:, None] for v in (said, self.truth))
        top = np.sum(w * x * y, axis=1)
        below = np.sqrt(np.sum(w * x * x, axis=1) * np.sum(w * y * y, axis=1))
        return np.asarray(np.divide(top, below, out=np.zeros_like(top), where=below > 1e-12))


def _of_subgroup(
    name: str,
    own: Bools,
    condition: str,
    judge: Judge,
    said: Mapping[str, Floats],
    n: int,
    sides: Sides,
    notes: str,
    key: Key,
) -> list[Estimate]:
    """What the readers of everybody say of a subgroup's held-out patients.

    Args:
        name: of the subgroup, `NAME=CATEGORY` or `NAME=HALF`.
        own: (n,) which of the judge's patients are its.
        condition: what was read.
        judge: of everybody.
        said: way to what its reader says of everybody.
        n: synthetic patients.
        sides: for the seed.
        notes: what limits the figures.
        key: draws the patients anew.
    """
    of, _, category = name.partition("=")
    start = "auc" if judge.kind == "category" else "r"
    # its own category is told from everybody else, of whom the subgroup has none
    itself = of == condition and judge.kind == "category"
    rows = np.arange(len(own)) if itself else np.flatnonzero(own)
    told = judge.truth == category if itself else judge.truth[rows]
    reason = _untestable(judge.kind, told, FEWEST)
    if own.sum() < FEWEST:  # their label is not known, or a large cohort was thinned
        reason = f"fewer than {FEWEST} held-out patients to ask"
    if reason:
        none = (None, None, None, None)
        return [one(title, name, *none, n, sides, reason, None) for title in names(start)]
    rng = key.fold("subgroup", name).numpy()
    only = [category] if itself else None
    part = Judge(judge.truth[rows], judge.kind, sides.resamples, rng, only)
    columns = [judge.categories.index(c) for c in part.categories] or [0]
    figures = {way: part.figures(s[rows][:, columns]) for way, s in said.items()}
    return estimates(start, name, figures, part, n, sides, notes, int(own.sum()))


def scored(reader: Any, x: Floats, judge: Judge) -> Floats:
    """(n, categories) probabilities in the judge's order, or (n, 1) numbers."""
    if judge.kind == "number":
        return np.asarray(reader.predict(x), dtype=np.float64)[:, None]
    out = np.zeros((len(x), len(judge.categories)))
    known = reader.predict_proba(x)
    for k, category in enumerate(judge.categories):
        at = np.nonzero(reader.classes_ == category)[0]
        if len(at):  # a category that was never taught is never said
            out[:, k] = known[:, at[0]]
    return out


def _reason(kind: Kind, truth: Mapping[Side, Any], test: Any) -> str:
    """Why a condition cannot be asked about; empty where it can."""
    untestable = _untestable(kind, test, SMALLEST_CLASS)
    if untestable:
        return untestable
    for side in ("train", "synthetic"):
        if kind == "number" and len(truth[side]) < 3:
            return f"fewer than three values in {side}"
        if kind == "category" and len(set(truth[side])) < 2:
            return f"fewer than two categories in {side}"
    return ""


def _untestable(kind: Kind, test: Any, least: int, taught: Any = ()) -> str:
    """Why held-out patients are too few to be asked about a condition; empty where they are not.

    Args:
        kind: of the condition.
        test: (n,) what is known of them.
        least: patients of every category, or values of a number.
        taught: what is known of others, whose categories are to be there too.
    """
    if kind == "number":
        if len(test) < least:
            return f"fewer than {least} values in holdout"
        return "" if np.ptp(test) > 0 else "all values are equal in holdout"
    known = {*test, *taught}
    if len(known) < 2:
        return "fewer than two categories in holdout"
    if min(int(np.sum(test == c)) for c in known) < least:
        # which one and how many is not said: this may be printed in what leaves the house
        return f"a category has fewer than {least} held-out patients"
    return ""


def _shortfall(estimates: Sequence[Estimate]) -> float:
    """How far a condition may fall short when taught by synthetic scans; unknown is the worst."""
    gaps = [e.ci for e in estimates if e.name.endswith("_tstr_minus_trtr")]
    return min(gap[0] if gap else -np.inf for gap in gaps)
