"""What every metric is: settings, a name, and `estimate`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.types import Estimate, Frozen


class Base(Frozen):
    """A metric; its fields are its settings, as the config holds them.

    With `by_subgroup` it is asked again about each label: it needs nothing but distributions of
    scans, which `subgroups.Part` gives.
    """

    by_subgroup: ClassVar[bool] = False

    @abstractmethod
    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """The figures, each with interval, floor and ceiling, or null with the reason."""
