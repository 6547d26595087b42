"""What the measures of utility share: ways of teaching, the patients of a curve, the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.blocks import Singles
from synthmed.metrics.reader import Kind
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate

WAYS = ("trtr", "tstr", "augmented", "classical_augmentation")
"""What a reader learns from: real scans, synthetic ones, both, or real and altered real ones."""
CURVE_WAYS = ("trtr", "augmented", "classical_augmentation")
"""Those that depend on how many real patients there are."""
DIFFERENCES = {
    "tstr_minus_trtr": ("tstr", "trtr"),
    "augmented_minus_trtr": ("augmented", "trtr"),
    "augmented_minus_classical": ("augmented", "classical_augmentation"),
}
"""Name to the two ways that are compared on the same patients."""
FEWEST = 8
"""Real patients at the start of the learning curve; it doubles from there."""
FEWEST_COPIES = 4
"""Altered copies of each training scan at least."""
SHIFT_VOXELS, ROTATE_DEGREES, INTENSITY = 2.0, 8.0, 0.1
"""Of the classical augmentation: what leaves a label as it is, and so no change of size."""


class Figure(NamedTuple):
    """What is measured of a reader: the words for it, its unit, and who is taught."""

    words: str
    unit: str
    learner: str = "a reader"


FIGURES = {
    "auc": Figure("AUC, one category against the rest,", "1"),
    "r": Figure("Pearson r", "r"),
    "dice": Figure("Dice coefficient with the patient's own mask", "1", "a segmenter"),
}
"""By the first word of an estimate's name."""

TAUGHT = {
    "trtr": "real training scans",
    "tstr": "the synthetic scans alone",
    "augmented": "real training scans and the synthetic ones",
    "classical_augmentation": "real training scans and altered copies of them",
}


class Judged(Protocol):
    """What an interval needs to know of whoever judges."""

    @property
    def smallest(self) -> int:
        """People of the smallest group that is resampled."""
        ...

    @property
    def guess(self) -> float:
        """The figure of a reader that knows nothing."""
        ...

    @property
    def least(self) -> float:
        """The smallest that a figure can be."""
        ...


def draws(n: int, times: int, groups: Sequence[Ints], rng: np.random.Generator) -> Floats:
    """(1 + times, n) how often each of n patients counts: once, then as drawn within groups."""
    weights = np.ones((times + 1, n))
    for group in groups:
        even = np.full(len(group), 1 / len(group))
        weights[1:, group] = rng.multinomial(len(group), even, size=times)
    return weights


def over_lessons(each: Sequence[Floats], key: Key) -> Floats:
    """(1 + times,) mean figure of readers taught alike; resampled over who taught them as well.

    Of k lessons (draws of patients, or seeds), k are drawn again for every draw of the tested
    patients. Their mean varies by (k - 1) / k of what another k would, which is made up for; from
    one alone nobody can tell.

    Args:
        each: (1 + times,) figures of each reader, all on the same draws of patients.
        key: equal for all ways of teaching that are compared: the same lessons are drawn again.
    """
    table = np.stack(each)
    mean, k = table.mean(axis=0), len(table)
    if k > 1:
        again = key.numpy().integers(0, k, (k, table.shape[1] - 1))
        moved = np.take_along_axis(table[:, 1:], again, axis=0).mean(axis=0) - mean[1:]
        mean[1:] += np.sqrt(k / (k - 1)) * moved
    return np.asarray(mean)


def certain(n: int) -> float:
    """1 - 0.025^(1 / n): how far from 1 the exact bound for n successes of n lies.

    Source: Clopper and Pearson 1934.
    """
    return float(1 - 0.025 ** (1 / n))


def widening(n: int) -> float:
    """How much farther than resampled n people real ones may lie: Student's t for the normal's
    quantile, of a variance that is (n - 1) / n of what it should be.

    >>> round(widening(10), 2), round(widening(100), 2)
    (1.22, 1.02)
    """
    from scipy.stats import t

    n = max(n, 2)
    return float(np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1) / 1.96)


def interval(values: Floats, judge: Judged, least: float | None = None) -> tuple[float, float]:
    """Percentiles of the resampled figures, round the first and `widening` apart; `least` is what
    it can be at worst."""
    value = float(values[0])
    low, high = (float(q) for q in np.quantile(values[1:], [0.025, 0.975]))
    if high - low < 1e-12:
        gap = certain(judge.smallest)
        low, high = value - gap, value + gap
    else:
        wide = widening(judge.smallest)
        low, high = value + wide * (low - value), value + wide * (high - value)
    bottom = least if least is not None else judge.least
    return max(bottom, min(low, value)), min(1.0, max(high, value))


def altered(
    block: Singles,
    first: int,
    sides: Sides,
    copy: int,
    flip: bool,
    is_image: Sequence[bool] | None = None,
) -> Singles:
    """A block (b, C, X, Y, Z) of training scans, each changed in a way that keeps its label.

    Args:
        block: the scans.
        first: number of the first of them.
        sides: for voxel size and key.
        copy: which of the copies.
        flip: whether they may be mirrored.
        is_image: (C,) False for a mask, which moves with its images and keeps its values but for
            interpolation at its edge; by default all are images.
    """
    import torch

    from synthmed.augment import apply, draw_change
    from synthmed.config import Augment

    change = Augment(
        flip=flip,
        shift_voxels=SHIFT_VOXELS,
        rotate_degrees=ROTATE_DEGREES,
        intensity=INTENSITY,
        probability=1.0,
    )
    images = torch.tensor([True] * block.shape[1] if is_image is None else list(is_image))
    out = []
    for i, scan in enumerate(block):
        g = sides.key.fold("utility", "altered", copy, first + i).torch()
        x = torch.from_numpy(np.ascontiguousarray(scan))
        out.append(apply(draw_change(change, g), x, sides.spacing_mm, images).numpy())
    return np.stack(out)


def numbered(
    shared: Shared, channels: Sequence[int] | None = None
) -> Iterator[tuple[int, Singles]]:
    """Blocks of train, each with the number of its first scan; by default its image channels."""
    first = 0
    for block in shared.blocks("train", channels):
        yield first, block
        first += len(block)


def copies(n_train: int, n_synthetic: int) -> int:
    """Altered copies of each scan of train: about as many as there are synthetic scans, or more.

    A point of the curve that has few of the patients has as few of the copies, which `copy_weight`
    makes up for; below `FEWEST_COPIES` of each they would be too much alike.
    """
    return max(FEWEST_COPIES, round(n_synthetic / max(1, n_train)))


def copy_weight(n_synthetic: int, weights: Floats, times: int) -> float:
    """Factor on the weights of altered copies, so that all weigh as the synthetic scans do.

    Args:
        n_synthetic: scans that the cohort would add, each of weight 1.
        weights: of the real scans that are copied.
        times: copies of each.
    """
    return float(n_synthetic / (times * weights.sum()))


def counts(n: int) -> list[int]:
    """Patients at each point of the curve below all of them.

    >>> counts(40)
    [8, 16, 32]
    """
    out = []
    count = FEWEST
    while count < n:
        out.append(count)
        count *= 2
    return out


def draw(person: Any, truth: Any, kind: Kind, count: int, key: Key) -> Any:
    """Some patients of train, evenly over their categories as far as these reach."""
    people = sorted(set(person))
    order = [people[i] for i in key.numpy().permutation(len(people))]
    if kind == "category":
        own = dict(zip(person, truth, strict=True))
        turn: dict[str, int] = {}
        ranks = []
        for p in order:
            ranks.append(turn.get(own[p], 0))
            turn[own[p]] = ranks[-1] + 1
        order = [order[i] for i in np.argsort(ranks, kind="stable")]
    return order[:count]


def of(person: Any, chosen: Sequence[str]) -> Ints:
    """The scans of some patients."""
    return np.nonzero(np.isin(person, chosen))[0].astype(np.int64)


def names(start: str) -> list[str]:
    """Of all estimates of one figure, the differences last.

    >>> names("auc")[0], names("auc")[-1]
    ('auc_trtr', 'auc_augmented_minus_classical')
    """
    return [f"{start}_{way}" for way in (*WAYS, *DIFFERENCES)]


def estimates(
    start: str,
    where: str | None,
    figures: Mapping[str, Floats],
    judge: Judged,
    n: int,
    sides: Sides,
    note: str,
    n_test: int,
) -> list[Estimate]:
    """Every way and every difference of two ways, at one number of patients.

    Args:
        start: of `FIGURES`.
        where: the slice.
        figures: way to (1 + times,) figures, as measured and resampled; all on the same patients.
        judge: for the ends of intervals.
        n: synthetic patients.
        sides: for the seed.
        note: what limits the figures.
        n_test: held-out patients behind them.
    """
    yardstick = float(figures["trtr"][0])
    out = []
    for way, values in figures.items():
        floor = None if way == "trtr" else yardstick
        more = "this is the yardstick, so no floor" if way == "trtr" else ""
        told = "; ".join(filter(None, (more, note)))
        name = f"{start}_{way}"
        ci = interval(values, judge)
        out.append(one(name, where, values, ci, floor, judge.guess, n, sides, told, n_test))
    for name, (a, b) in DIFFERENCES.items():
        if a in figures and b in figures:
            apart = figures[a] - figures[b]
            ceiling = judge.guess - float(figures[b][0])
            full = f"{start}_{name}"
            ci = interval(apart, judge, -1.0)
            out.append(one(full, where, apart, ci, 0.0, ceiling, n, sides, note, n_test))
    return out


def one(
    name: str,
    where: str | None,
    values: Floats | None,
    ci: tuple[float, float] | None,
    floor: float | None,
    ceiling: float | None,
    n: int,
    sides: Sides,
    note: str,
    n_holdout: int | None,
) -> Estimate:
    """One estimate, with the sentence that says how it was made; null where `values` are."""
    start, short = name.split("_", 1)
    what, unit, learner = FIGURES[start]
    method = f"{what} on held-out patients of {learner} taught by {TAUGHT.get(short, 'scans')}"
    if short in DIFFERENCES:
        a, b = (TAUGHT[w] for w in DIFFERENCES[short])
        method = f"{what} on the same held-out patients: taught by {a}, less taught by {b}"
    return Estimate(
        name=name,
        group="utility",
        slice=where,
        value=None if values is None else float(values[0]),
        ci=ci,
        unit=unit,
        n=n,
        better="higher",
        floor=floor,
        ceiling=ceiling,
        method=f"{method}; bootstrap interval by patient.",
        seed=sides.seed,
        note=note,
        n_holdout=n_holdout,
    )
