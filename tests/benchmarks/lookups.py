"""What faults.py works out once for all people, so that a draw of people only looks it up."""

from __future__ import annotations

import itertools
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
    samples = rows(cohort)
    tests = [GapTest(rows(train), rows(holdout), view, Key.root(0)) for view in views]
    found = {i for test in tests for i in test.find(samples, FDR / len(tests)).flagged}
    return len(found) / len(cohort)


def differences(scans: Scans, pairs: int, rng: np.random.Generator) -> dict[tuple[int, int], float]:
    """1 - MS-SSIM of some pairs of people."""
    chosen = {tuple(sorted(rng.choice(len(scans), 2, replace=False))) for _ in range(pairs)}
    return {(int(i), int(j)): 1 - ms_ssim(scans[i], scans[j]) for i, j in sorted(chosen)}


def among(pool: Pool, people: Ints) -> float:
    """The mean difference of two samples of some people, who may come again and again.

    Args:
        pool: pairs whose difference is known; those of these people stand for all of theirs.
        people: a sample each.
    """
    inside = set(people.tolist())
    apart = float(np.mean([d for pair, d in pool.items() if inside.issuperset(pair)]))
    _, times = np.unique(people, return_counts=True)
    same = np.sum(times * (times - 1)) / (len(people) * (len(people) - 1))
    return float(1 - same) * apart


def between(scans: Scans, people: Ints) -> dict[tuple[int, int], float]:
    """1 - MS-SSIM of all pairs of a few people."""
    few = np.unique(people).tolist()
    return {(i, j): 1 - ms_ssim(scans[i], scans[j]) for i, j in itertools.combinations(few, 2)}


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
