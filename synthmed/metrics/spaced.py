"""mmd2 and frechet in other spaces than the descriptor: regions, the user's network, radiomics."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.base import Base
from synthmed.metrics.frechet import Frechet
from synthmed.metrics.mmd import MMD
from synthmed.metrics.network import Network
from synthmed.metrics.radiomics import Radiomics
from synthmed.metrics.shared import Shared, Side, moments
from synthmed.metrics.sides import Sides
from synthmed.metrics.spaces import Measure, RegionVolumes, Space
from synthmed.metrics.stats import Floats, Ints
from synthmed.types import Estimate

Feature = Annotated[Network | Radiomics, Field(discriminator="kind")]
"""What a config can add by `evaluate.features`."""
AnySpace = Annotated[RegionVolumes | Network | Radiomics, Field(discriminator="kind")]


class InSpace(Base):
    """Distances of distributions in another space of features than the descriptor.

    `mmd2`, `mmd2_excess` and `frechet` exactly as `MMD` and `Frechet` define them, on the numbers
    of `space`, z-scored on real train, with slice `features=NAME`. By default the space is that of
    the volumes of regions, which the descriptor does not see (`RegionVolumes`); a config adds more
    by `evaluate.features`.
    """

    name: Literal["features"] = "features"
    space: AnySpace = RegionVolumes()

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """Three estimates; null as theirs are.

        Raises:
            UsageError: the space cannot be entered, as its `measure` says.
        """
        mapped = Mapped(shared, self.space)
        found = [*MMD().estimate(mapped.sides, mapped), *Frechet().estimate(mapped.sides, mapped)]
        return [self._here(e) for e in found]

    def _here(self, estimate: Estimate) -> Estimate:
        method = estimate.method
        if self.space.numbers not in method:
            method = f"In {self.space.numbers}: {method}"
        if estimate.name == "frechet" and self.space.variant:
            method = f"{self.space.variant}: {method}"
        update = {"slice": f"features={self.space.name}", "method": method}
        return estimate.model_copy(update=update)


class Mapped(Shared):
    """What `Shared` keeps of a cohort, with the numbers of a space for its features.

    Args:
        whole: the caches of the cohort; people and scans are its own.
        space: where scans become numbers.
    """

    def __init__(self, whole: Shared, space: Space) -> None:
        sides = replace(whole.sides, key=whole.sides.key.fold("features", space.name))
        super().__init__(sides, None, whole.false_discovery_rate)
        self.numbers, self.control = space.numbers, space.control
        self._whole, self._space = whole, space
        self._measure: Measure | None = None
        self._measured: dict[Side, Floats] = {}
        self._moments: tuple[Floats, Floats] | None = None

    def patients(self, side: Side) -> list[Ints]:
        return self._whole.patients(side)

    def scans(self, side: Side) -> Ints:
        return self._whole.scans(side)

    def features(self, side: Side) -> Floats:
        if self._moments is None:
            mean, sd = moments(self._raw("train"), self.patients("train"))
            self._moments = mean, np.maximum(sd, self._space.least(mean, sd))
        mean, scale = self._moments
        return (self._raw(side) - mean) / scale

    def _raw(self, side: Side) -> Floats:
        if self._measure is None:
            self._measure = self._space.measure(self._whole)
        if side not in self._measured:
            self._measured[side] = self._measure(side)
        return self._measured[side]
