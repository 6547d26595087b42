"""segmentability, dice_*: do images show what their masks say, and does the pair teach that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.keys import Key
from synthmed.metrics.base import Base
from synthmed.metrics.blocks import Singles
from synthmed.metrics.school import Examined, School
from synthmed.metrics.segmenter import Layout
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Bools, Floats, Ints
from synthmed.metrics.subgroups import FEWEST, judged
from synthmed.metrics.taught import (
    CURVE_WAYS,
    WAYS,
    counts,
    draw,
    draws,
    estimates,
    interval,
    names,
    of,
    one,
    over_lessons,
)
from synthmed.types import Estimate

Part = Mapping[str, Sequence[Singles]]
"""Way to the segmenters that were taught in it."""


@dataclass(frozen=True)
class Mean:
    """Mean figures of patients, as they are and resampled.

    Args:
        weights: (1 + times, n) from `draws`.
        guess: the figure of who never looked at an image.
    """

    weights: Floats
    guess: float = 0.0
    least: ClassVar[float] = 0.0

    @property
    def smallest(self) -> int:
        """Patients."""
        return int(self.weights.shape[1])

    def figures(self, each: Floats) -> Floats:
        """(1 + times,) of one figure a patient."""
        return np.asarray(self.weights @ each / self.weights.sum(axis=1))


class Segmentation(Base):
    """A segmenter taught by real and by synthetic pairs of image and mask; higher is better.

    For cohorts with masks; without any there is no estimate. Masks that are given count as well as
    those that are drawn: whoever made the mask, the pair is what a segmenter learns from, and the
    image has to show it. The segmenter (`segmenter`) is simple and quick; the figure is its Dice
    coefficient, 2 |A and B| / (|A| + |B|), a mean over a patient's scans and then over patients.
    Two empty regions agree (1); one that is empty alone does not (0).

    - `segmentability`: taught by real train, asked about the synthetic images, against the masks
      these came with. Low: images do not show what their masks say. Above its floor: they are
      easier to read than real ones, without the doubtful edges, which is no merit. Floor: held-out
      patients. Ceiling: what it sees in held-out patients, against the masks of other ones.
    - `dice_trtr`: taught by real train, on held-out patients. The floor of all that follow.
    - `dice_tstr`: taught by the synthetic pairs.
    - `dice_augmented`: taught by both, each scan weighing the same.
    - `dice_classical_augmentation`: taught by real train and altered copies of it (moved, turned,
      brightened), which together weigh as much as the synthetic scans. What a cohort has to beat.
    - `dice_tstr_minus_trtr`, `dice_augmented_minus_trtr`, `dice_augmented_minus_classical`:
      differences on the same patients, with paired intervals. Floor 0.

    Their ceiling is the label map of most of train, said of everyone: what is known without a look
    at the image. Of differences it is the same less the yardstick.

    Slice null: mean over the regions (labels of all masks) that a held-out patient has. Slice
    `region=NAME`: one of several. Slice `N patients`: the learning curve, as in `utility`. Slice
    `NAME=CATEGORY`: a subgroup, of whose patients the same segmenters are asked.
    Intervals: bootstrap of patients, widened where it has no spread, and of the seeds, or of who
    was drawn to teach (`over_lessons`); that other patients than train would have taught another
    segmenter is not in them. Masks of tissue too thin for the grid, at most 64 voxels a side, are
    not judged well.

    Args:
        draws: of the patients behind each point of the curve.
        seeds: of the voxels that teach; figures are means over them.
        flip: whether the altered copies may be mirrored: only where the anatomy is symmetric.

    Source: Dice 1945; Esteban, Hyland and Rätsch 2017, arXiv:1706.02633 (TSTR).
    """

    name: Literal["segmentation"] = "segmentation"
    draws: Annotated[int, Field(ge=1)] = 2
    seeds: Annotated[int, Field(ge=1)] = 2
    flip: bool = False

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """All ways, regions and the curve; none where there is no mask."""
        layout = Layout.of(sides)
        if not layout.regions or not layout.images:
            return []
        import sklearn.linear_model  # noqa: F401  # the limit holds for what has been loaded
        import torch  # noqa: F401
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        # short sums by the hundred thousand: several threads wait for one another longer than they
        # work, and on a shared machine take four times as long
        with threadpool_limits(limits=1):
            return self._measured(layout, sides, shared)

    def _measured(self, layout: Layout, sides: Sides, shared: Shared) -> list[Estimate]:
        if not len(sides.train) or not len(sides.synthetic):
            return _none(True, "no training scan, or no synthetic one", shared)
        key = sides.key.fold("segmentation")
        school = School(shared, layout, self.seeds, self.flip, key)
        if not school.shown.any():
            return _none(True, "no training scan shows a region", shared)
        everyone = np.arange(len(school.person))
        whole = {w: [school.segmenter(w, everyone, s) for s in range(self.seeds)] for w in WAYS}
        made = school.examine("synthetic", whole["trtr"])
        titles = [sides.channels[i].name for i in layout.regions]
        if not shared.has_holdout:
            slices = _slices(titles, school.shown)
            out = [_segmentability(where, k, made, None, "", shared) for where, k in slices.items()]
            return out + _none(False, "no held-out patients", shared)
        curve = self._curve(school, key)
        parts = {None: whole, **curve}
        held = school.examine(
            "holdout", [m for part in parts.values() for own in part.values() for m in own]
        )
        if not held.present.any():
            return _none(True, "no held-out patient has a region", shared)
        absent = [title for title, there in zip(titles, held.present, strict=True) if not there]
        notes = [school.looked_at(), f"no held-out patient has {', '.join(absent)}: left out"]
        note = "; ".join(filter(None, notes if absent else notes[:1]))
        slices = _slices(titles, held.present)
        out = [_segmentability(where, k, made, held, note, shared) for where, k in slices.items()]
        out += _taught(parts, slices, held, note, key, shared)
        for name, people in judged(sides).items():
            of, own = made.of(people["synthetic"]), held.of(people["holdout"])
            regions = np.flatnonzero(own.present)
            # thinning may have left too few of them
            if min(len(of.patients), len(own.patients)) >= FEWEST and len(regions):
                fold = key.fold("subgroup", name)
                out.append(_segmentability(name, regions, of, own, note, shared))
                out += _taught({None: whole}, {name: regions}, own, note, fold, shared)
        return out

    def _curve(self, school: School, key: Key) -> dict[str | None, Part]:
        """The segmenters of each point of the learning curve, by slice."""
        out: dict[str | None, Part] = {}
        for count in counts(len(set(school.person))):
            picks = [
                of(
                    school.person,
                    draw(school.person, None, "number", count, key.fold("curve", count, d)),
                )
                for d in range(self.draws)
            ]
            out[f"{count} patients"] = {
                way: [school.segmenter(way, rows, d) for d, rows in enumerate(picks)]
                for way in CURVE_WAYS
            }
        return out


def _slices(titles: Sequence[str], present: Bools) -> dict[str | None, Ints]:
    """Slice to its regions: all that are present, then each where there are several."""
    each = np.flatnonzero(present)
    out: dict[str | None, Ints] = {None: each}
    if len(titles) > 1:
        out |= {f"region={titles[int(k)]}": np.array([k]) for k in each}
    return out


def _taught(
    parts: Mapping[str | None, Part],
    slices: Mapping[str | None, Ints],
    held: Examined,
    note: str,
    key: Key,
    shared: Shared,
) -> list[Estimate]:
    """The estimates of utility: the whole and its regions, then each point of the curve."""
    n = len(held.own)
    weights = draws(n, shared.sides.resamples, [np.arange(n)], key.fold("test").numpy())
    out: list[Estimate] = []
    first = 0
    for point, part in parts.items():
        for where, regions in slices.items() if point is None else [(point, slices[None])]:
            judge = Mean(weights, float(held.placed[:, regions].mean()))
            figures, at = {}, first
            for way, own in part.items():
                each = held.own[:, at : at + len(own)][:, :, regions].mean(axis=2)
                lessons = [judge.figures(one) for one in each.T]
                figures[way] = over_lessons(lessons, key.fold("again", str(point)))
                at += len(own)
            # how many is of patients, and a note may leave the house
            empty = "some held-out masks are empty" if held.empty[:, regions].any() else ""
            told = "; ".join(filter(None, (note, empty)))
            n_made = len(shared.patients("synthetic"))
            out += estimates("dice", where, figures, judge, n_made, shared.sides, told, n)
        first += sum(map(len, part.values()))
    return out


def _segmentability(
    where: str | None,
    regions: Ints,
    made: Examined,
    held: Examined | None,
    note: str,
    shared: Shared,
) -> Estimate:
    """What a segmenter taught by real train sees in synthetic images, against their masks."""
    sides, n = shared.sides, len(made.own)
    key = sides.key.fold("segmentation", "segmentability")
    judge = Mean(draws(n, sides.resamples, [np.arange(n)], key.numpy()))
    values = judge.figures(made.own[:, :, regions].mean(axis=(1, 2)))
    value, ci = float(values[0]), interval(values, judge)
    floor = ceiling = None
    notes = [note, _empty(made, regions)]
    if held is None:
        notes.append("no held-out patients: no floor and no ceiling")
    else:
        seeds = made.own.shape[1]  # those taught by all of real train come first
        floor = float(held.own[:, :seeds][:, :, regions].mean())
        if ci[0] > floor:
            notes.append("above the floor: easier to read than real scans")
        if held.others is None:
            notes.append("one held-out patient: no ceiling")
        else:
            ceiling = float(held.others[:, :seeds][:, :, regions].mean())
    told, n_held = "; ".join(filter(None, notes)), len(held.patients) if held else None
    return _fidelity(where, value, ci, floor, ceiling, n, told, n_held, shared.sides.seed)


def _fidelity(
    where: str | None,
    value: float | None,
    ci: tuple[float, float] | None,
    floor: float | None,
    ceiling: float | None,
    n: int,
    note: str,
    n_holdout: int | None,
    seed: int,
) -> Estimate:
    return Estimate(
        name="segmentability",
        group="fidelity",
        slice=where,
        value=value,
        ci=ci,
        n=n,
        better="higher",
        floor=floor,
        ceiling=ceiling,
        method="Dice coefficient of each synthetic mask with what a segmenter taught by real "
        "training scans sees in its image; floor: the same of held-out patients; ceiling: what it "
        "sees in these against the masks of others; bootstrap interval by patient.",
        seed=seed,
        note=note,
        n_holdout=n_holdout,
    )


def _none(everything: bool, reason: str, shared: Shared) -> list[Estimate]:
    """The estimates of utility without values, and `segmentability` where that has none too."""
    n = len(shared.patients("synthetic"))
    nothing, seed = (None, None, None, None, None), shared.sides.seed
    out = [_fidelity(*nothing, n, reason, shared.n_holdout, seed)] if everything else []
    return out + [
        one(name, None, None, None, None, None, n, shared.sides, reason, None)
        for name in names("dice")
    ]


def _empty(examined: Examined, regions: Ints) -> str:
    """How many synthetic masks hold no voxel, for the note; empty where all do."""
    n = int(examined.empty[:, regions].sum())
    return f"{n} of {examined.n_scans.sum() * len(regions)} masks are empty" if n else ""
