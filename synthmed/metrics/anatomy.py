"""region_volume_smd: are the parts of the anatomy as large as in patients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from synthmed.metrics.adjusted import encoded, without_labels
from synthmed.metrics.base import Base, leading
from synthmed.metrics.blocks import Singles
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Z95, Floats
from synthmed.types import Estimate

FOREGROUND = 0.15
"""Prepared intensity below which a voxel is no tissue."""
CLASSES = ("dark tissue", "middle tissue", "bright tissue")
"""What stands for regions where the cohort has no masks."""
LEVELS = 256
"""Steps of intensity that Otsu's thresholds are sought on."""
GROWN = 1.1
"""Of the known-bad control: held-out people whose regions are larger by a tenth."""
LEAST_SPREAD = 0.01
"""Standard deviation that volumes have at least, as a part of their mean."""


class RegionVolumeSMD(Base):
    """Standardised difference of region volumes, synthetic against held out; lower is better.

    |mean_s - mean_h| / sqrt((var_s + var_h) / 2) of the volume in millimetres of each label of the
    masks that a cohort draws; a mask that is given says nothing of what was drawn and is left out.
    Without masks the regions are three tissue classes: voxels above `FOREGROUND`, divided by the
    two thresholds of Otsu on all of train. They see another share of grey and white, and not a
    region that has moved. A patient's volume is the mean over the scans.

    One estimate a region with slice `region=NAME`, and with slice null the one whose upper bound is
    the highest. Where there are labels, again with slice `region=NAME, given labels` for log
    volumes less what labels explain of them in train (`adjusted`): people who are alike in
    diagnosis and age differ less, so that a smaller difference is seen.

    Floor: real train against the same; ceiling: held-out regions grown by a tenth, against train.
    Interval: 1.96 standard errors of a large sample to either side, where the two spreads may
    differ (`smd`).

    Source: Cohen 1988 (the difference); Bonett 2008, Psychological Methods 13:99 (its variance);
    Otsu 1979.
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["region_volume_smd"] = "region_volume_smd"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """All regions and the worst; null with fewer than three patients a side."""
        real = shared.reference
        used: tuple[Side, ...] = ("synthetic", "train", real)
        masks = drawn_masks(sides)
        names = [sides.channels[i].name for i in masks] or list(CLASSES)
        n = len(shared.patients("synthetic"))
        if min(len(shared.patients(side)) for side in used) < 3:
            note = "fewer than three patients on a side"
            return [self._one(None, None, None, None, None, n, note, sides, shared)]
        edges = None if masks else thresholds(shared)
        volume = {side: _volumes(shared, side, masks, edges) for side in used}
        out = []
        for k, name in enumerate(names):
            made, people, train = (volume[side][:, k] for side in ("synthetic", real, "train"))
            value, ci = smd(made, people)
            floor = ceiling = None
            note = "no held-out patients: against train; no floor and no ceiling"
            if shared.has_holdout:
                floor, ceiling = smd(train, people)[0], smd(GROWN * people, train)[0]
                note = f"mean {made.mean():.4g} and {people.mean():.4g} mm3"
            where = f"region={name}"
            out.append(self._one(where, value, ci, floor, ceiling, n, note, sides, shared))
        if shared.has_holdout and (sides.categorical or sides.continuous):
            given = self._given_labels(names, volume, n, sides, shared)
        else:
            given = []
        worst = max(out, key=lambda e: e.ci[1] if e.ci else 0.0)
        return [leading(worst, out), *out, *given]

    def _given_labels(
        self,
        names: Sequence[str],
        volume: Mapping[Side, Floats],
        n: int,
        sides: Sides,
        shared: Shared,
    ) -> list[Estimate]:
        """The same of what labels leave unexplained; null with too few people to tell what does."""
        labels = {
            side: encoded(
                [shared.cases(side).labels[shared.scans(side)[own[0]]] for own in rows],
                sides.categorical,
                sides.continuous,
            )
            for side, rows in ((side, shared.patients(side)) for side in volume)
        }
        left = without_labels(labels["train"], volume["train"])
        out = []
        for k, name in enumerate(names):
            where = f"region={name}, given labels"
            if left is None:
                note = "too few training patients for so many labels"
                one = self._one(where, None, None, None, None, n, note, sides, shared)
            else:
                made, people, train = (
                    left(labels[side], volume[side])[:, k]
                    for side in ("synthetic", "holdout", "train")
                )
                floor = smd(train, people, LEAST_SPREAD)[0]
                ceiling = smd(people + np.log(GROWN), train, LEAST_SPREAD)[0]
                value, ci = smd(made, people, LEAST_SPREAD)
                note = f"{made.mean() - people.mean():+.3f} in the log of the volume"
                one = self._one(where, value, ci, floor, ceiling, n, note, sides, shared)
            out.append(one)
        return out

    @staticmethod
    def _one(
        where: str | None,
        value: float | None,
        ci: tuple[float, float] | None,
        floor: float | None,
        ceiling: float | None,
        n: int,
        note: str,
        sides: Sides,
        shared: Shared,
    ) -> Estimate:
        return Estimate(
            name="region_volume_smd",
            group="fidelity",
            slice=where,
            value=value,
            ci=ci,
            unit="standard deviations",
            n=n,
            better="lower",
            floor=floor,
            ceiling=ceiling,
            method="Standardised mean difference of region volumes, synthetic against held-out "
            "patients; floor: real train against the same; ceiling: held-out regions grown by a "
            "tenth; large-sample interval.",
            seed=sides.seed,
            note=note,
            n_holdout=shared.n_holdout,
        )


def smd(x: Floats, y: Floats, least: float | None = None) -> tuple[float, tuple[float, float]]:
    """Size of the standardised difference of two samples, and its 95 % interval.

    With means of n and m people, their variances v and w, and s^2 = (v + w) / 2, the difference is
    d = |mean_x - mean_y| / s. By the delta method its variance is that of the means over s^2, and
    d^2 / (4 s^4) times that of s^2, for normal samples (v^2 / (n - 1) + w^2 / (m - 1)) / 2:

    se^2 = (v / n + w / m) / s^2 + d^2 (v^2 / (n - 1) + w^2 / (m - 1)) / (8 s^4).

    A cohort is often less various than people and larger than the holdout. Then the error is that
    of the holdout's mean, w / (m s^2), up to twice the variance that equal spreads would have.

    Args:
        x: one.
        y: the other.
        least: standard deviation at least; by default a hundredth of the mean of y. Where it stands
            for s it stands for both samples' own, so that no interval is a point.

    Source: Bonett 2008, Psychological Methods 13:99, with n for n - 1 under the means.
    """
    n, m = len(x), len(y)
    v, w = float(x.var(ddof=1)), float(y.var(ddof=1))
    if least is None:
        least = LEAST_SPREAD * abs(float(y.mean()))
    least = max(least, 1e-12)
    if (v + w) / 2 < least**2:
        v = w = least**2
    variance = (v + w) / 2
    d = float(abs(x.mean() - y.mean()) / np.sqrt(variance))
    of_means = (v / n + w / m) / variance
    of_spread = d**2 * (v**2 / (n - 1) + w**2 / (m - 1)) / (8 * variance**2)
    reach = Z95 * float(np.sqrt(of_means + of_spread))
    return d, (max(0.0, d - reach), d + reach)


def drawn_masks(sides: Sides) -> list[int]:
    """The channels that are masks which a cohort draws; not those that it is given."""
    return [i for i, c in enumerate(sides.channels) if c.mask is not None and not c.given]


def thresholds(shared: Shared) -> Floats:
    """(2,) Otsu's thresholds of the tissue of train, its first image channel.

    Those of everybody, also where `shared` is a subgroup: its classes are everybody's.
    """
    from skimage import filters

    otsu: Any = filters.threshold_multiotsu  # carries no types
    bins = np.linspace(FOREGROUND, 1.25, LEVELS + 1)
    first = shared.images[:1]
    each = shared.everybody.per_scan(
        "train",
        "histogram",
        LEVELS,
        lambda block: np.stack([np.histogram(scan, bins)[0] for scan in block]),
        first,
    )
    counts = each.sum(axis=0)
    if np.count_nonzero(counts) < len(CLASSES):  # nothing to divide
        return np.quantile(bins, [1 / 3, 2 / 3])
    centres = (bins[:-1] + bins[1:]) / 2
    return np.asarray(otsu(classes=len(CLASSES), hist=(counts, centres)))


def scan_volumes(shared: Shared, side: Side, masks: Sequence[int], edges: Floats | None) -> Floats:
    """(n_scans, regions) volumes in cubic millimetres.

    Args:
        shared: the sides.
        side: one of them.
        masks: the channels that are regions (`drawn_masks`); may be empty.
        edges: `thresholds`, where there are no masks.
    """

    def voxels(block: Singles) -> Floats:
        if edges is None:
            return np.asarray(block.sum(axis=(2, 3, 4), dtype=np.float64))
        tissue = block[:, 0]
        bounds = [FOREGROUND, *edges, np.inf]
        classes = [(tissue >= a) & (tissue < b) for a, b in itertools.pairwise(bounds)]
        return np.stack([c.sum(axis=(1, 2, 3)) for c in classes], axis=1).astype(np.float64)

    name = f"voxels of channels {masks}" if edges is None else f"voxels between {edges.tolist()}"
    width = len(masks) or len(CLASSES)
    counts = shared.per_scan(side, name, width, voxels, masks or shared.images[:1])
    return counts * float(np.prod(shared.sides.spacing_mm))


def _volumes(shared: Shared, side: Side, masks: Sequence[int], edges: Floats | None) -> Floats:
    """(n_patients, regions) volumes in cubic millimetres, means over a patient's scans."""
    scans = scan_volumes(shared, side, masks, edges)
    return np.stack([scans[own].mean(axis=0) for own in shared.patients(side)])
