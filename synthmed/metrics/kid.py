"""kid: the distance of mmd2's question by another kernel, a second opinion."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from synthmed.metrics.base import Base
from synthmed.metrics.kernels import discrepancy
from synthmed.metrics.mmd import of_distance
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats
from synthmed.types import Estimate


class KID(Base):
    """Kernel distance with the cubic kernel of KID; lower is better, 0 is equal.

    The unbiased squared MMD of `mmd2` with k(a, b) = (a . b / d + 1)^3 on z-scored descriptors of
    d numbers. A polynomial kernel sees the first three moments alone, and far outliers weigh much.

    Source: Binkowski et al. 2018, arXiv:1801.01401 (there on the features of a network).
    """

    by_subgroup: ClassVar[bool] = True
    name: Literal["kid"] = "kid"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null without three patients a side."""

        def kernel(a: Side, b: Side) -> Floats:
            x, y = shared.features(a), shared.features(b)
            return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

        found = discrepancy(shared, kernel, sides.resamples, sides.key.fold("kid", "permutation"))
        what = f"Unbiased cubic MMD^2 of {shared.numbers}"
        return [of_distance("kid", what, found, sides, shared)]
