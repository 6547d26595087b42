"""What every metric is: settings, a name, and `estimate`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.types import Estimate, Frozen


class Base(Frozen):
    """A metric; its fields are its settings, as the config holds them.

    With `by_subgroup` it is asked again about each label: it needs nothing but the scans of the
    subgroup, which `subgroups.Part` gives. A metric that teaches something by everybody has it
    False and adds the subgroups itself, so that nothing is taught twice.
    """

    by_subgroup: ClassVar[bool] = False

    @abstractmethod
    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """The figures, each with interval, floor and ceiling, or null with the reason."""
