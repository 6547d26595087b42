"""Where scans become numbers, beside the descriptor: what such a space is, and that of regions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from synthmed.metrics.anatomy import GROWN, LEAST_SPREAD, drawn_masks, scan_volumes, thresholds
from synthmed.metrics.shared import BLURRED, Shared, Side
from synthmed.metrics.stats import Floats
from synthmed.types import Frozen

Slug = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=40)]
Measure = Callable[[Side], Floats]
"""A side to its (n_scans, D) numbers, in the order of `Shared.scans`."""


class Space(Frozen):
    """A way from scans to numbers; its fields are its settings, `kind` tells the ways apart.

    `name` stands in the slices of its estimates (`features=NAME`), and `control` says what stands
    behind the side `blurred` in it, the known-bad control.
    """

    control: ClassVar[str] = BLURRED
    name: Slug

    @property
    def variant(self) -> str:
        """What the Frechet distance in such a space is called elsewhere."""
        return ""

    @property
    @abstractmethod
    def numbers(self) -> str:
        """What the numbers are, for the method sentences."""

    def verify(self) -> None:
        """See that what the space needs is there, before hours are spent on what it will judge.

        Raises:
            UsageError: as `measure`, of what can be known without scans.
        """

    @abstractmethod
    def measure(self, shared: Shared) -> Measure:
        """What maps a side; all that is costly and the same for every side is done here, once.

        Raises:
            UsageError: what the space needs is missing or is not what the config says.
        """

    @abstractmethod
    def least(self, mean: Floats, sd: Floats) -> Floats:
        """(D,) the standard deviation that each number has at least when it is z-scored.

        Without it a number that hardly moves in train would outweigh all others.

        Args:
            mean: (D,) of train.
            sd: (D,) of train.
        """


class RegionVolumes(Space):
    """Volumes of all regions together, as logarithms.

    The regions are those of `region_volume_smd`: labels of the masks that a cohort draws, or three
    tissue classes. There each volume is looked at alone, and in its mean; here a cohort is seen
    whose regions are each as large as they should be, and do not belong together. A volume counts
    as one voxel at least. Blur leaves volumes as they are, so that the known-bad control is the
    holdout with regions that are larger by a tenth.
    """

    control: ClassVar[str] = "held-out regions grown by a tenth"
    kind: Literal["regions"] = "regions"
    name: Literal["regions"] = "regions"

    @property
    def numbers(self) -> str:
        return "log volumes of the regions jointly"

    def measure(self, shared: Shared) -> Measure:
        masks = drawn_masks(shared.sides)
        edges = None if masks else thresholds(shared)
        voxel = float(np.prod(shared.sides.spacing_mm))

        def logarithms(side: Side) -> Floats:
            grown = np.log(GROWN) if side == "blurred" else 0.0
            real: Side = "holdout" if side == "blurred" else side
            volumes = scan_volumes(shared, real, masks, edges)
            return np.asarray(np.log(np.maximum(volumes, voxel)) + grown)

        return logarithms

    def least(self, mean: Floats, sd: Floats) -> Floats:
        return np.full(len(sd), LEAST_SPREAD)
