"""discriminator_auc: can a classifier tell synthetic scans from real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.keys import Key
from synthmed.metrics.base import Base
from synthmed.metrics.shared import Shared, Side, pick
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import (
    Floats,
    auc,
    clopper_pearson,
    half,
    half_se,
    normal_interval,
)
from synthmed.types import Estimate


class DiscriminatorAUC(Base):
    """AUC of a classifier of real against synthetic scans, by patient; 0.5 is best.

    Logistic regression on z-scored descriptors and on the first whitened principal components of
    real train at `side` voxels a side: the one sees texture, the other where things are, a mirrored
    head among them. Every scan is scored by a classifier that saw neither it nor another of its
    patient; one scan a patient, equal counts of synthetic and held-out patients, a mean over
    `draws` of these scans and of the parts of the cross-validation. The classifier of a few is
    weak, so that a figure near 0.5 from few of them is no acquittal; the floor is real train in the
    place of synthetic at the same count (cross-validated AUCs of equal distributions lie a little
    below 0.5). Far below 0.5 lies a cohort of near twins of held-out people: who is left out of the
    training of a classifier has a twin there, of the other side. Ceiling: the blurred holdout
    against train. Interval: from halves of the patients of one draw, classifiers trained anew on
    each: a bootstrap of the scores, which leaves the classifiers as they are, held the average in
    83 % of studies instead of 95.

    Args:
        folds: of the cross-validation, fewer where there are fewer patients.
        ridge: strength of the penalty, scikit-learn's 1 / C.
        side: voxels a side of what is reduced to components.
        components: at most; also at most a third of the scans of train.
        draws: that a figure is a mean of; each figure behind the interval is of one.
        halves: behind the interval.

    Source: Lopez-Paz and Oquab 2017, arXiv:1610.06545 (classifier two-sample tests).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["discriminator_auc"] = "discriminator_auc"
    folds: Annotated[int, Field(ge=2)] = 5
    ridge: Annotated[float, Field(gt=0)] = 10.0
    side: Annotated[int, Field(ge=4, le=32)] = 12
    components: Annotated[int, Field(ge=1)] = 30
    draws: Annotated[int, Field(ge=1)] = 5
    halves: Annotated[int, Field(ge=20)] = 100

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null with fewer than four patients a side."""
        real = shared.reference
        used: tuple[Side, ...] = ("train", real, "synthetic")
        count = min(len(shared.patients(side)) for side in used)
        key = sides.key.fold("discriminator_auc")
        value = ci = floor = ceiling = None
        note = "a side has fewer than four patients"
        if count >= 4:
            controls: tuple[Side, ...] = ("blurred",) if shared.has_holdout else ()
            seen = self._seen(shared, (*used, *controls))

            def rows(a: Side, b: Side, key: Key) -> list[Floats]:
                """One scan each of `count` patients of either side."""
                rng = key.numpy()
                out = []
                for side in (a, b):
                    groups = shared.patients(side)
                    chosen = np.sort(rng.permutation(len(groups))[:count])
                    out.append(seen[side][pick([groups[i] for i in chosen], rng)])
                return out

            def told(of: Sequence[Floats], key: Key) -> float:
                return auc(*told_apart(of[0], of[1], self.folds, self.ridge, key.numpy()))

            def figure(a: Side, b: Side, key: Key) -> float:
                """The mean over draws."""
                each = [key.fold("draw", i) for i in range(self.draws)]
                return float(np.mean([told(rows(a, b, k), k.fold("folds")) for k in each]))

            value = figure("synthetic", real, key.fold("value"))
            made = rows("synthetic", real, key.fold("value").fold("draw", 0))
            halves = []
            for i in range(self.halves if count >= 8 else 0):
                rng = key.fold("half", i).numpy()
                part = [x[half(count, rng)] for x in made]
                halves.append(told(part, key.fold("half", i, "folds")))
            ci = _interval(value, np.array(halves), count) if halves else None
            note = "" if halves else "too few patients for an interval"
            if shared.has_holdout:
                floor = figure("train", real, key.fold("floor"))
                ceiling = figure("blurred", "train", key.fold("ceiling"))
            else:
                lacking = "no held-out patients: told from training patients; no floor, no ceiling"
                note = "; ".join(filter(None, (lacking, note)))
        return [
            Estimate(
                name="discriminator_auc",
                group="fidelity",
                value=value,
                ci=ci,
                n=len(shared.patients("synthetic")),
                better="match",
                target=0.5,
                floor=floor,
                ceiling=ceiling,
                method="Logistic regression on descriptors and principal components of small "
                f"images, {self.folds}-fold by patient, {shared.counted(count)} a side, mean of "
                f"{self.draws} draws; floor: "
                "real train told from held-out patients; ceiling: the holdout blurred by 0.4 voxel "
                "told from train; interval from halves of the patients.",
                seed=sides.seed,
                note=note,
                n_holdout=shared.n_holdout,
            )
        ]

    def _seen(self, shared: Shared, sides: Sequence[Side]) -> dict[Side, Floats]:
        """(n_scans, features) what the classifier sees of each side."""
        placed = places(shared.small("train", self.side), self.components)
        return {
            side: np.hstack([shared.features(side), placed(shared.small(side, self.side))])
            for side in dict.fromkeys(sides)
        }


def _interval(value: float, halves: Floats, n: int) -> tuple[float, float]:
    """From the AUCs of halves; down to the exact bound for n of n where less than half a patient is
    on the wrong side, which halves of one draw may not show."""
    low, high = normal_interval(value, half_se(halves), 0.0, 1.0)
    return (min(low, clopper_pearson(n, n)[0]) if value > 1 - 0.5 / n else low), high


def places(train: Floats, components: int) -> Callable[[Floats], Floats]:
    """Whitened principal components of small images of train, as a function of small images."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(train)
    kept = max(1, min(components, len(train) // 3, train.shape[1]))
    axes = PCA(kept, svd_solver="full").fit(scale.transform(train))
    spread = np.sqrt(np.maximum(axes.explained_variance_, 1e-12))
    return lambda scans: np.asarray(axes.transform(scale.transform(scans)) / spread)


def told_apart(
    x: Floats, y: Floats, folds: int, ridge: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Scores of (n, D) and (m, D) scans by logistic regressions that never saw them."""
    from sklearn.linear_model import LogisticRegression

    both, label = np.concatenate([x, y]), np.repeat([1, 0], [len(x), len(y)])
    fold = np.concatenate([rng.permutation(np.arange(len(v)) % folds) for v in (x, y)])
    scores = np.empty(len(both))
    for k in range(min(folds, len(both))):
        test = fold == k
        if test.any():
            reader = LogisticRegression(C=1 / ridge, max_iter=2000)
            scores[test] = reader.fit(both[~test], label[~test]).decision_function(both[test])
    return scores[: len(x)], scores[len(x) :]
