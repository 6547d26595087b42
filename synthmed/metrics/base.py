"""What every metric is: settings, a name, and `estimate`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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


def leading(worst: Estimate, parts: Sequence[Estimate]) -> Estimate:
    """The worst of some slices as the estimate of the whole, which stands for all of them."""
    note = "; ".join(filter(None, (f"worst of {len(parts)}: {worst.slice}", worst.note)))
    stands_for = tuple(e.slice for e in parts)
    return worst.model_copy(update={"slice": None, "note": note, "stands_for": stands_for})


def of_subgroup(whole: Estimate, name: str) -> Estimate:
    """What is the whole to a subgroup, as its slice.

    It stands for nothing: the slices that it was the worst of have everybody's names.
    """
    return whole.model_copy(update={"slice": name, "stands_for": ()})
