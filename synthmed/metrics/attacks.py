"""Two more membership attacks: the ratio of two densities, and the nearest sample by descriptor.

Both treat training and held-out patients alike: whatever they learn comes from the cohort that is
attacked, or from all real patients together. So with a cohort that says nothing of who was in,
people of both sides can be exchanged, and a permutation p keeps its level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.descriptor import RESOLUTION
from synthmed.metrics.principal import SIDE, axes
from synthmed.metrics.shared import Shared, Side, moments
from synthmed.metrics.stats import (
    Bools,
    Floats,
    Ints,
    auc_interval,
    auc_permutation_p,
    percentiles,
    permutation_p,
    permuted_labels,
    wins,
)

NARROW = 0.5
"""Width of the cohort's kernel, as a part of the reference's: overfitting is a local thing."""


@dataclass(frozen=True)
class Attack:
    """What an attack made of everybody; `auc` is its headline.

    Args:
        wins: (n_members, n_others) 1 where a member scores higher, 0.5 at a tie, 0 otherwise; its
            mean is the AUC.
        ci: 95 % interval of the AUC.
        p: of a permutation of who was in.
    """

    wins: Floats
    ci: tuple[float, float]
    p: float

    @property
    def auc(self) -> float:
        """P(a member scores higher than a non-member), ties half."""
        return float(self.wins.mean())


def by_scores(members: Floats, others: Floats, times: int, key: Key) -> Attack:
    """The attack that holds higher scores for members', resampled `times` times.

    Args:
        members: one score a training patient.
        others: one a held-out patient.
        times: draws behind interval and p.
        key: of these draws.
    """
    return Attack(
        wins(members, others),
        auc_interval(members, others, times, key.fold("ci").numpy()),
        auc_permutation_p(members, others, times, key.fold("p").numpy()),
    )


def descriptor_scores(shared: Shared, cohort: Side) -> tuple[Floats, Floats]:
    """Of each training and each held-out patient, minus the distance to the nearest of a cohort.

    The Euclidean distance between descriptors, each number divided by its standard deviation over
    all real patients (not over train alone, as in `Shared.features`, which makes training patients
    a little nearer to everything); the smallest over a patient's scans.
    """
    from scipy.spatial.distance import cdist

    real: tuple[Side, Side] = ("train", "holdout")
    n_scans = len(shared.descriptors("train"))
    everyone = [*shared.patients("train"), *(g + n_scans for g in shared.patients("holdout"))]
    _, sd = moments(np.concatenate([shared.descriptors(side) for side in real]), everyone)
    scale = np.maximum(sd, np.tile(RESOLUTION, len(shared.images)))
    made = shared.descriptors(cohort) / scale
    near = {s: cdist(shared.descriptors(s) / scale, made).min(axis=1) for s in real}
    members, others = (
        np.array([-near[s][g].min() for g in shared.patients(s)], dtype=np.float64) for s in real
    )
    return members, others


@dataclass(frozen=True)
class Ratio:
    """The ratio of the cohort's density to that of the population, for everybody at once.

    Args:
        near: (n,) log density of the cohort at each patient.
        kernel: (n, n) what patient j adds to the reference's density at patient i; 0 where i is j.
            Row i may have any factor whose log is in `near[i]` as well.
        members: (n,) who was trained on.
    """

    near: Floats
    kernel: Floats
    members: Bools

    def wins(self, members: Bools | None = None, times: Ints | None = None) -> Floats:
        """(n_members, n_others): whether member i has a higher ratio than non-member j.

        The reference of this pair is the non-members without j, for both: equal in number, and
        neither is in it. Given that reference and the cohort, i and j can be exchanged when the
        cohort says nothing of membership, so the expected AUC is 0.5 exactly. (A reference of
        their own for each would let j speak of i, and never i of j.)

        Args:
            members: other labels, for permutations.
            times: (n_others,) how often each non-member counts, for a bootstrap.
        """
        inside = self.members if members is None else members
        counts = np.ones(int((~inside).sum())) if times is None else times
        parts = self.kernel[np.ix_(inside, ~inside)] * counts
        of_members = parts.sum(axis=1, keepdims=True) - parts
        # without the largest part next to nothing may be left, which a difference would round off
        each, largest = np.arange(len(parts)), parts.argmax(axis=1)
        parts[each, largest] = 0.0
        of_members[each, largest] = parts.sum(axis=1)
        of_others = self.kernel[np.ix_(~inside, ~inside)] @ counts
        with np.errstate(divide="ignore"):  # a reference that is too far to be seen is at 0
            left = self.near[inside][:, None] + np.log(of_others)
            right = self.near[~inside] + np.log(of_members)
        return np.asarray((left > right) + 0.5 * (left == right), dtype=np.float64)

    def attack(self, times: int, key: Key) -> Attack:
        """The AUC with its interval and p.

        Interval: percentiles of a bootstrap by patient of both sides, the reference drawn anew
        with the non-members it is made of (no copy of j is ever in the reference of j). p: labels
        permuted by patient, the reference made anew of whoever is then a non-member.
        """
        found = self.wins()
        n, m = found.shape
        rng = key.fold("ci").numpy()
        draws = np.empty(times)
        for b in range(times):
            rows = rng.multinomial(n, np.full(n, 1 / n))
            columns = rng.multinomial(m, np.full(m, 1 / m))
            draws[b] = rows @ self.wins(times=columns) @ columns / (n * m)
        low, high = percentiles(draws, min(n, m))
        value = float(found.mean())
        labels = permuted_labels(n, n + m, times, key.fold("p").numpy())
        null = np.array([self.wins(members=row).mean() for row in labels])
        return Attack(found, (min(low, value), max(high, value)), permutation_p(value, null))


def ratio(shared: Shared, cohort: Side) -> Ratio | None:
    """log p_cohort(x) - log p_reference(x) of all patients; null where the cohort is one scan.

    Densities are Gaussian kernel sums in the `principal` components of the cohort's small images.
    The reference's width is Scott's, h = n^(-1 / (k + 4)) standard deviations with n its number of
    patients and k that of components; the cohort's is half of it. A patient's density is the mean
    over the scans, and each patient of the reference weighs the same.

    Source: van Breugel et al. 2023, AISTATS (DOMIAS); Scott 1992 (the width).
    """
    space = axes(shared.small(cohort, SIDE))
    if space is None:
        return None
    real: tuple[Side, Side] = ("train", "holdout")
    at = np.concatenate([space.of(shared.small(side, SIDE)) for side in real])
    sizes = [len(g) for side in real for g in shared.patients(side)]
    made = space.of(shared.small(cohort, SIDE))
    n_members = len(shared.patients("train"))
    width = (len(sizes) - n_members - 1) ** (-1 / (at.shape[1] + 4))
    alone = [1] * len(made)
    near = np.logaddexp.reduce(_log_kernel(at, sizes, made, alone, NARROW * width), axis=1)
    between = _log_kernel(at, sizes, at, sizes, width)
    np.fill_diagonal(between, -np.inf)
    # only ratios matter: each row is scaled so that its largest part is 1 and none is lost
    largest = between.max(axis=1)
    members = np.arange(len(sizes)) < n_members
    return Ratio(near - largest, np.exp(between - largest[:, None]), members)


def _log_kernel(
    a: Floats, sizes_a: Sequence[int], b: Floats, sizes_b: Sequence[int], width: float
) -> Floats:
    """(patients of a, patients of b) log of the mean Gaussian kernel between their scans."""
    from scipy.spatial.distance import cdist

    log = -cdist(a, b, "sqeuclidean") / (2 * width**2)
    for axis, sizes in ((0, sizes_a), (1, sizes_b)):
        starts = np.cumsum([0, *sizes[:-1]])
        log = np.logaddexp.reduceat(log, starts, axis=axis)
        log -= np.expand_dims(np.log(sizes), 1 - axis)
    return np.asarray(log)
