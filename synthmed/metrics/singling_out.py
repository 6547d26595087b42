"""Singling out: a description, read off the cohort, that fits one patient and nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from synthmed.metrics.records import Records, Targets
from synthmed.metrics.risk import Outcome, Rate, of_patients
from synthmed.metrics.stats import Bools, Floats, Ints

CONJUNCTIONS = 400
"""Descriptions of several attributes; those of one come on top."""
ATTRIBUTES = (3, 5)
"""Fewest and most attributes of such a description."""
REACH = 0.1
"""How far a number may be from a record's, as a share of the cohort's ranks on either side."""
SLACK = 1e-9
"""Numbers this close are equal: a product of matrices may round them differently."""


@dataclass(frozen=True)
class Columns:
    """Records as numbers: (n, a) with NaN for what is not known, and (n, b) categories, -1 so."""

    numbers: Floats
    categories: Ints


@dataclass(frozen=True)
class Descriptions:
    """Conjunctions: a number lies between `low` and `high`, a category is `category`.

    Args:
        low: (p, a); minus infinity where anything will do.
        high: (p, a); infinity likewise.
        category: (p, b); -1 likewise.
    """

    low: Floats
    high: Floats
    category: Ints

    def fit(self, people: Columns) -> Bools:
        """(p, n) whom each description fits; what is not known fits none that asks for it."""
        fits = np.ones((len(self.low), len(people.numbers)), dtype=bool)
        for k in range(self.low.shape[1]):
            x, low, high = people.numbers[:, k], self.low[:, k, None], self.high[:, k, None]
            inside = (x >= low - SLACK) & (x <= high + SLACK)
            fits &= inside | (np.isneginf(low) & np.isposinf(high))
        for k in range(self.category.shape[1]):
            asked = self.category[:, k, None]
            fits &= (asked < 0) | (asked == people.categories[:, k])
        return fits


def singling_out(tables: Targets, rng: np.random.Generator) -> Outcome:
    """How often a description that the cohort suggests fits exactly one of m people.

    Descriptions: each number's largest and smallest value in the cohort (`at least`, `at most`) and
    each category that one sample alone has; and `CONJUNCTIONS` of three to five attributes of a
    random sample, a number being within a tenth of the cohort's ranks on either side. Guessing
    puts attributes of different samples together.

    m is one less than the smaller real side has; the rate of each side is the exact mean over all
    choices of m of its people (hypergeometric), so that both are comparable, and its interval
    comes from leaving out one patient at a time: descriptions share people, so they are no trials.

    Raises:
        ValueError: fewer than three people on a side.

    Source: Article 29 Working Party, Opinion 05/2014; Giomi et al. 2023;
    Cohen and Nissim 2020 (predicates and their weight).
    """
    cohort, train, holdout = (
        columns(t, tables) for t in (tables.cohort, tables.train, tables.holdout)
    )
    n_train, n_holdout = len(train.numbers), len(holdout.numbers)
    if min(n_train, n_holdout) < 3:
        raise ValueError(f"singling_out: {n_train} and {n_holdout} people, expected 3 a side")
    m = min(n_train, n_holdout) - 1
    told, guessed = describe(cohort, rng, whole=True), describe(cohort, rng, whole=False)
    return Outcome(
        alone(told.fit(train), m),
        alone(told.fit(holdout), m),
        alone(guessed.fit(train), m).value,
        n_train,
        n_holdout,
    )


def columns(people: Records, tables: Targets) -> Columns:
    """Image components and labels of some people as columns."""
    numbers = [_numbers(people, name) for name in tables.continuous]
    categories = [_codes(people, n, known) for n, known in tables.categorical.items()]
    nothing = np.zeros((len(people), 0))
    return Columns(
        np.concatenate([people.image, *(c[:, None] for c in numbers)], axis=1),
        np.stack(categories, axis=1) if categories else nothing.astype(np.int64),
    )


def describe(cohort: Columns, rng: np.random.Generator, whole: bool) -> Descriptions:
    """Descriptions of single samples (whole), or of what no sample has together (guesses)."""
    n, a = cohort.numbers.shape
    b = cohort.categories.shape[1]
    most = min(ATTRIBUTES[1], a + b)
    sizes = rng.integers(min(ATTRIBUTES[0], most), most + 1, size=CONJUNCTIONS)
    order = np.argsort(rng.random((CONJUNCTIONS, a + b)), axis=1)
    asked = np.argsort(order, axis=1) < sizes[:, None]
    rows = rng.integers(n, size=(CONJUNCTIONS, 1 if whole else a + b))
    rows = np.broadcast_to(rows, (CONJUNCTIONS, a + b))
    low, high = np.full((CONJUNCTIONS, a), -np.inf), np.full((CONJUNCTIONS, a), np.inf)
    category = np.full((CONJUNCTIONS, b), -1, dtype=np.int64)
    for k in range(a):
        near = _around(cohort.numbers[:, k])
        low[:, k] = np.where(asked[:, k], near[0][rows[:, k]], -np.inf)
        high[:, k] = np.where(asked[:, k], near[1][rows[:, k]], np.inf)
    for k in range(b):
        values = cohort.categories[:, k][rows[:, a + k]]
        category[:, k] = np.where(asked[:, a + k], values, -1)
    single = _single(cohort, rng, whole)
    return Descriptions(
        np.concatenate([low, single.low]),
        np.concatenate([high, single.high]),
        np.concatenate([category, single.category]),
    )


def alone(fits: Bools, m: int) -> Rate:
    """How often exactly one of m people fits, from (descriptions, n people), m < n."""
    n = fits.shape[1]
    counts = fits.sum(axis=1)
    value = float(_exactly_one(n, m)[counts].mean())
    fewer = _exactly_one(n - 1, m)
    without = np.array([fewer[counts - column].mean() for column in fits.T])
    return of_patients(value, without)


def _exactly_one(n: int, m: int) -> Floats:
    """(n + 1,) by how many of n people fit: the chance that m of the n hold exactly one of them."""
    from scipy.stats import hypergeom

    return np.asarray(hypergeom.pmf(1, n, np.arange(n + 1), m), dtype=np.float64)


def _single(cohort: Columns, rng: np.random.Generator, whole: bool) -> Descriptions:
    """Descriptions by one attribute that stands out; guesses take any sample's value."""
    low, high, category = [], [], []
    for k, values in enumerate(cohort.numbers.T):
        known = values[~np.isnan(values)]
        if not len(known):  # a label that no sample has
            continue
        ends = (known.max(), known.min()) if whole else rng.choice(known, 2)
        low += [
            _only(cohort.numbers, k, ends[0], -np.inf),
            _only(cohort.numbers, k, -np.inf, -np.inf),
        ]
        high += [
            _only(cohort.numbers, k, np.inf, np.inf),
            _only(cohort.numbers, k, ends[1], np.inf),
        ]
    n_numbers = len(low)
    for k, codes in enumerate(cohort.categories.T):
        found, counts = np.unique(codes[codes >= 0], return_counts=True)
        rare = found[counts == 1]
        chosen = rare if whole else rng.choice(codes[codes >= 0], len(rare))
        category += [_only(cohort.categories, k, code, -1) for code in chosen]
    anything = [_only(cohort.numbers, 0, x, x) for x in (-np.inf, np.inf)]
    any_category = np.full((n_numbers, cohort.categories.shape[1]), -1)
    return Descriptions(
        np.stack([*low, *[anything[0]] * len(category)]),
        np.stack([*high, *[anything[1]] * len(category)]),
        np.concatenate([any_category, *(c[None] for c in category)]).astype(np.int64),
    )


def _only(like: Floats | Ints, k: int, value: float, rest: float) -> Floats:
    """(columns,) of `rest`, but for column k."""
    return np.where(np.arange(like.shape[1]) == k, value, rest)


def _around(values: Floats) -> tuple[Floats, Floats]:
    """For each value of a column the ends of its neighbourhood; nothing is asked of a NaN."""
    known = ~np.isnan(values)
    low, high = np.full(len(values), -np.inf), np.full(len(values), np.inf)
    ordered = np.sort(values[known])
    n = len(ordered)
    if n == 0:
        return low, high
    first = np.searchsorted(ordered, values[known], side="left")
    last = np.searchsorted(ordered, values[known], side="right") - 1
    reach = max(1, round(REACH * n))
    down, up = first - reach, last + reach
    low[known] = np.where(down < 0, -np.inf, ordered[np.maximum(down, 0)])
    high[known] = np.where(up >= n, np.inf, ordered[np.minimum(up, n - 1)])
    return low, high


def _numbers(people: Records, name: str) -> Floats:
    values = (r.get(name) for r in people.labels)
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def _codes(people: Records, name: str, known: Sequence[str]) -> Ints:
    place = {c: i for i, c in enumerate(known)}
    return np.array([place.get(str(r.get(name)), -1) for r in people.labels], dtype=np.int64)
