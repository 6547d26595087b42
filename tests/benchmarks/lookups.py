"""What faults.py works out once for all people, so that a draw of people only looks it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.keys import Key
from synthmed.metrics.copies import GapTest
from synthmed.metrics.diversity import ms_ssim
from synthmed.metrics.segmenter import Basis, Layout, dice, lesson, read, surroundings, teach
from synthmed.metrics.sides import Cases
from synthmed.metrics.similarity import Features, ImageSimilarity, Looked, Scores
from synthmed.metrics.stats import Floats, Ints
from tests.metrics.cohorts import made

FDR = 0.01
Scans = Sequence[npt.NDArray[Any]]
Pool = Mapping[tuple[int, int], float]
"""Two people to how much their scans differ, for some pairs."""


@dataclass(frozen=True)
class Likeness:
    """One view of `ImageSimilarity`, of scans whose scores are known.

    A scan is named by its row, a person by that of their own scan.

    Args:
        scores: (scans, people) of every scan, as it is and spoilt, with that of every person.
        name: of the view.
        same: the score of a scan with itself.
    """

    scores: Floats
    name: str
    same: float

    def features(self, cases: Cases) -> Features:
        return cases.patients.astype(np.int64)

    def fit(self, train: Features) -> Likeness:
        return self

    def compare(self, queries: Features, references: Features) -> Scores:
        return Scores(self.scores[np.ix_(queries, references)])

    def closer(self, found: Scores, queries: Looked, references: Looked) -> Floats:
        """Closer looks depend on who is on which side, and are left out here."""
        return found.best


def likenesses(versions: Sequence[Scans]) -> list[Likeness]:
    """Both views; the first version is that of people as they are, and a row is n k + i for scan i
    of version k."""
    out = []
    for tissue in (False, True):
        view = ImageSimilarity((0,), tissue)
        each = [view.features(made(np.stack(scans)[:, None])) for scans in versions]
        scores = [view.compare(features, each[0]).best for features in each]
        out.append(Likeness(np.concatenate(scores), view.name, view.same))
    return out


def rows(numbers: Ints) -> Cases:
    """Scans by their rows alone."""
    names = np.array([f"{i:06}" for i in numbers])
    return Cases(np.zeros((len(names), 1, 1, 1, 1), np.float32), names, [{}] * len(names))


def flagged(views: Sequence[Likeness], train: Ints, holdout: Ints, cohort: Ints) -> float:
    """Share of a cohort that the copies test flags, by both views."""
    sides = rows(train), rows(holdout)
    # twice the same scan is two samples
    samples = rows(cohort)
    tests = [GapTest(*sides, view, Key.root(0)) for view in views]
    found = {i for test in tests for i in test.find(samples, FDR / len(tests)).flagged}
    return len(found) / len(cohort)


def differences(scans: Scans, pairs: int, rng: np.random.Generator) -> dict[tuple[int, int], float]:
    """1 - MS-SSIM of some pairs of people."""
    chosen = {tuple(sorted(rng.choice(len(scans), 2, replace=False))) for _ in range(pairs)}
    return {(int(i), int(j)): 1 - ms_ssim(scans[i], scans[j]) for i, j in sorted(chosen)}


def among(pool: Pool, people: Ints) -> float:
    """The mean difference of the pairs in a pool that are among some people."""
    inside = set(people.tolist())
    return float(np.mean([d for pair, d in pool.items() if inside.issuperset(pair)]))


def collapsed(scans: Scans, pool: dict[tuple[int, int], float], people: Ints) -> float:
    """The mean difference of scans of people of whom some come again and again.

    Args:
        scans: of everybody.
        pool: what is known of pairs; those that are missing are added.
        people: a scan each.
    """
    each = []
    for a in range(len(people)):
        for b in range(a):
            i, j = sorted((int(people[a]), int(people[b])))
            if i != j and (i, j) not in pool:
                pool[i, j] = 1 - ms_ssim(scans[i], scans[j])
            each.append(pool[i, j] if i != j else 0.0)
    return float(np.mean(each))


def segmented(
    versions: Sequence[tuple[Scans, Scans]], taught: Sequence[Ints], rng: np.random.Generator
) -> list[Floats]:
    """Of every version (people, segmenters) mean Dice over regions with the mask that goes with it.

    Args:
        versions: scans and masks (R, X, Y, Z), first of people as they are.
        taught: who teaches each segmenter.
        rng: draws the voxels that teach.
    """
    scans, masks = versions[0]
    n = len(masks[0])
    layout = Layout((0,), (tuple(range(1, n + 1)),), scans[0].shape, (1.0, 1.0, 1.0))

    def pair(scan: Any, mask: Any) -> tuple[Any, Any]:
        whole = np.concatenate([scan[None], mask]).astype(np.float32)
        images, labels = layout.split(whole)
        return surroundings(images, layout.spacing_mm), labels

    lessons = [lesson(*pair(s, m), layout, rng) for s, m in zip(scans, masks, strict=True)]
    basis = Basis(lessons)
    segmenters = [
        teach(basis, [lessons[i] for i in own], np.ones(len(own)), layout.sizes) for own in taught
    ]
    out = []
    for own_scans, own_masks in versions:
        each = []
        for scan, mask in zip(own_scans, own_masks, strict=True):
            features, labels = pair(scan, mask)
            seen = read(basis, segmenters, features, layout.sizes)
            each.append([dice(s, labels, layout.sizes).mean() for s in seen])
        out.append(np.array(each))
    return out
