"""A reader of labels: what the scans of one side teach about a condition, asked about another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.stats import Floats

Names = npt.NDArray[np.str_]
Kind = Literal["category", "number"]
"""Of a condition."""


def fit(x: Floats, y: Any, weight: Floats, kind: Kind, components: int) -> Any:
    """Standardised, reduced by PCA, and read by logistic regression or ridge regression.

    Args:
        x: (n, voxels) from `Shared.small`.
        y: (n,) categories or numbers.
        weight: (n,) of each scan in the regression.
        kind: of the condition.
        components: principal components at most; also at most a third of the scans.
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if np.ptp(x, axis=0).max() == 0:  # one scan over and over teaches nothing
        nothing = DummyClassifier() if kind == "category" else DummyRegressor()
        return nothing.fit(x, y, sample_weight=weight)
    kept = max(2, min(components, len(x) // 3, x.shape[1]))
    # the same unit for every component, so that the ridge shrinks them alike
    steps = (StandardScaler(), _principal(kept, *x.shape), StandardScaler())
    if kind == "category":
        reader = make_pipeline(
            *steps, LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        )
        return reader.fit(x, y, logisticregression__sample_weight=weight)
    return make_pipeline(*steps, Ridge(alpha=10.0)).fit(x, y, ridge__sample_weight=weight)


def _principal(kept: int, n: int, voxels: int) -> Any:
    """Principal components; of few scans of many voxels by the products of the scans.

    These are a linear kernel's components, several times as fast as by singular values, and none is
    made of rounding where scans repeat. The products of many voxels would be.
    """
    from sklearn.decomposition import PCA, KernelPCA

    if n <= voxels:
        return KernelPCA(kept, kernel="linear", eigen_solver="dense")
    return PCA(kept, svd_solver="full")


def correlation(a: Floats, b: Floats) -> float:
    """Pearson r; 0 where one of them is constant."""
    if np.std(a) < 1e-12 or np.std(b) < 1e-12:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def asked(shared: Shared, side: Side, condition: str) -> list[str | float | None]:
    """The condition of every scan kept by `shared`, null where it is not known."""
    labels = shared.cases(side).labels
    return [labels[i].get(condition) for i in shared.scans(side)]


def as_array(values: Sequence[Any], kind: Kind) -> Any:
    """(n,) known labels, as text or as numbers."""
    if kind == "category":
        return np.array([str(v) for v in values], dtype=str)
    return np.array([float(v) for v in values], dtype=np.float64)


def left_out(values: Mapping[Side, Sequence[str | float | None]]) -> list[str]:
    """On which real sides scans could not be used, for the note; empty where labels are known.

    How many is not said: a note may be printed in the report that leaves the house.
    """
    words: tuple[tuple[Side, str], ...] = (("train", "training"), ("holdout", "held-out"))
    parts = [word for side, word in words if None in values[side]]
    return [f"label not known of some {' and some '.join(parts)} scans: left out"] if parts else []


def patient_weights(shared: Shared, rows: Sequence[int]) -> Floats:
    """One over the number of scans that the training patient of each row has among `rows`."""
    person = shared.sides.train.patients[shared.scans("train")[list(rows)]]
    _, which, counts = np.unique(person, return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[which])


def first_scans(shared: Shared, rows: Sequence[int]) -> list[int]:
    """The first of `rows` of each held-out patient."""
    kept = set(rows)
    firsts = ([i for i in group if i in kept][:1] for group in shared.patients("holdout"))
    return [int(i) for first in firsts for i in first]
