"""Pairs of image and mask of every side: what each teaches, and what segmenters see in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.blocks import Singles, blocks
from synthmed.metrics.reader import patient_weights
from synthmed.metrics.segmenter import (
    Basis,
    Layout,
    Lesson,
    Maps,
    dice,
    lesson,
    read,
    surroundings,
    teach,
)
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.stats import Bools, Floats, Ints
from synthmed.metrics.taught import altered, copies, copy_weight

MOST_SCANS = 256
"""Scans of a side that are looked at: time grows with them, what is learned hardly does."""


@dataclass(frozen=True)
class Examined:
    """What S segmenters see of R regions in the scans of n patients, means over their scans.

    Args:
        own: (n, S, R) Dice with the patient's masks.
        others: (n, S, R) Dice with the masks of another patient; null with one patient alone.
        placed: (n, R) Dice of the label map of most of train with the patient's masks.
        empty: (n, R) scans of a patient whose mask holds no voxel of the region.
        n_scans: (n,) of each patient.
        patients: (n,) who they are.
    """

    own: Floats
    others: Floats | None
    placed: Floats
    empty: Ints
    n_scans: Ints
    patients: Sequence[str]

    @property
    def present(self) -> Bools:
        """(R,) whether any patient has the region."""
        return np.asarray((self.empty < self.n_scans[:, None]).any(axis=0))

    def of(self, people: Collection[str]) -> Examined:
        """Some of the patients."""
        rows = [i for i, p in enumerate(self.patients) if p in people]
        return Examined(
            own=self.own[rows],
            others=None if self.others is None else self.others[rows],
            placed=self.placed[rows],
            empty=self.empty[rows],
            n_scans=self.n_scans[rows],
            patients=[self.patients[i] for i in rows],
        )


class School:
    """Lessons of real train, of altered copies of it and of the synthetic scans.

    A side of more than `MOST_SCANS` scans is thinned to that many, patients drawn by key.

    Args:
        shared: the sides.
        layout: where images and masks are.
        seeds: draws of the voxels that teach.
        flip: whether the altered copies may be mirrored.
        key: of all draws.
    """

    def __init__(self, shared: Shared, layout: Layout, seeds: int, flip: bool, key: Key) -> None:
        self.shared, self.layout, self.key, self.flip = shared, layout, key, flip
        used: tuple[Side, ...] = ("train", "holdout", "synthetic")
        self.rows = {side: self._kept(side) for side in used}
        self.weights = patient_weights(shared, self.rows["train"].tolist())
        self.person = self._people("train")
        self.times = copies(len(self.person), len(self.rows["synthetic"]))
        self.train = self._lessons("train", seeds)
        self.made = self._lessons("synthetic", seeds)
        self.altered = [self._lessons("train", seeds, copy) for copy in range(self.times)]
        self.basis = Basis([one for of_seed in self.train for one in of_seed])
        often = self._often()
        self.shown = np.asarray(often.any(axis=1))  # regions that a training scan has
        self.placed = layout.labels(often)

    def segmenter(self, way: str, rows: Ints, seed: int) -> Singles:
        """Taught in one of `taught.WAYS`.

        Args:
            way: one of them.
            rows: real training scans that it has, as numbers among those that are looked at.
            seed: of the voxels; beyond the last it begins anew.
        """
        seed %= len(self.train)
        lessons: list[Lesson] = []
        weights: list[float] = []
        if way != "tstr":
            lessons += [self.train[seed][i] for i in rows]
            weights += self.weights[rows].tolist()
        if way in ("tstr", "augmented"):
            lessons += self.made[seed]
            weights += [1.0] * len(self.made[seed])
        if way == "classical_augmentation":
            own = self.weights[rows]
            each = copy_weight(len(self.made[seed]), own, self.times) * own
            for copy in self.altered:
                lessons += [copy[seed][i] for i in rows]
                weights += each.tolist()
        return teach(self.basis, lessons, np.array(weights), self.layout.sizes)

    def examine(self, side: Side, segmenters: Sequence[Singles]) -> Examined:
        """What segmenters see in a side, against its masks; at least one scan.

        The other patient is the one before, of the first the last: so no more than two label maps
        are held at a time, and every patient's masks are used.
        """
        people, sizes = self._people(side), self.layout.sizes
        own, others, placed, volumes = [], [], [], []
        first: list[Maps] = []  # what is seen in the first patient waits for the last one's masks
        before: Maps | None = None
        last: Maps | None = None
        for i, (images, labels) in enumerate(self._pairs(side)):
            seen = read(self.basis, segmenters, self._features(images), sizes)
            if i and people[i] != people[i - 1]:
                before = last
            own.append([dice(s, labels, sizes) for s in seen])
            placed.append(dice(self.placed, labels, sizes))
            volumes.append(self.layout.inside(labels).sum(axis=1))
            if before is None:
                first.append(seen)
            else:
                others.append([dice(s, before, sizes) for s in seen])
            last = labels
        if before is not None and last is not None:
            others = [[dice(s, last, sizes) for s in seen] for seen in first] + others
        groups = [np.flatnonzero(np.array(people) == p) for p in dict.fromkeys(people)]

        def by_patient(scans: Any) -> Floats:
            values = np.array(scans, dtype=np.float64)
            return np.stack([values[rows].mean(axis=0) for rows in groups])

        empty = np.array(volumes) == 0
        return Examined(
            own=by_patient(own),
            others=by_patient(others) if others else None,
            placed=by_patient(placed),
            empty=np.stack([empty[rows].sum(axis=0) for rows in groups]),
            n_scans=np.array([len(rows) for rows in groups]),
            patients=list(dict.fromkeys(people)),
        )

    def looked_at(self) -> str:
        """Which sides were thinned, for the note; empty where none was."""
        words = {"train": "training", "holdout": "held-out", "synthetic": "synthetic"}
        parts = [
            f"{len(rows)} of {len(self.shared.scans(side))} {words[side]} scans"
            for side, rows in self.rows.items()
            if len(rows) < len(self.shared.scans(side))
        ]
        return f"looked at {', '.join(parts)}" if parts else ""

    def _kept(self, side: Side) -> Ints:
        """Rows of `Shared.scans` that are looked at, in order, a patient's together."""
        groups = self.shared.patients(side)
        rows = np.arange(sum(map(len, groups)), dtype=np.int64)
        if len(rows) <= MOST_SCANS:
            return rows
        order = self.key.fold("scans", side).numpy().permutation(len(groups))
        return np.sort(np.concatenate([groups[i] for i in order])[:MOST_SCANS])

    def _people(self, side: Side) -> list[str]:
        patients = self.shared.cases(side).patients
        return [str(p) for p in patients[self.shared.scans(side)[self.rows[side]]]]

    def _pairs(self, side: Side, copy: int | None = None) -> Iterator[tuple[Singles, Maps]]:
        """(I, X, Y, Z) images and (M, voxels) label maps of each scan; of a copy, altered."""
        shared, layout, rows = self.shared, self.layout, self.rows[side]
        is_image = [True] * len(layout.images) + [False] * len(layout.regions)
        scans = shared.scans(side)[rows]
        every = (scan for b in blocks(shared.cases(side), layout.channels, scans) for scan in b)
        for row, scan in zip(rows.tolist(), every, strict=True):
            if copy is not None:
                scan = altered(scan[None], row, shared.sides, copy, self.flip, is_image)[0]
            yield layout.split(scan)

    def _features(self, images: Singles) -> Singles:
        return surroundings(images, self.layout.spacing_mm)

    def _lessons(self, side: Side, seeds: int, copy: int | None = None) -> list[list[Lesson]]:
        """Of every seed, a lesson a scan."""
        out: list[list[Lesson]] = [[] for _ in range(seeds)]
        for i, (images, labels) in enumerate(self._pairs(side, copy)):
            features = self._features(images)
            for seed, lessons in enumerate(out):
                fold = self.key.fold("voxels", side, -1 if copy is None else copy, i, seed)
                lessons.append(lesson(features, labels, self.layout, fold.numpy()))
        return out

    def _often(self) -> Floats:
        """(R, voxels) share of the training patients who have each region there."""
        out = np.zeros((len(self.layout.regions), int(np.prod(self.layout.grid))))
        for weight, (_, labels) in zip(self.weights, self._pairs("train"), strict=True):
            out += weight * self.layout.inside(labels)
        return out / len(set(self.person))
