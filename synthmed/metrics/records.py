"""What an attacker may know of a person: labels, and what the image shows in a few numbers.

One record a patient, of the first scan; of the cohort one a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from synthmed.metrics.principal import SIDE, axes
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.stats import Floats
from synthmed.types import Labels


@dataclass(frozen=True)
class Records:
    """Some people, in one order throughout.

    Args:
        image: (n, k) principal components of the whole image, in standard deviations.
        lower: (n, k) of its lower half.
        upper: (n, k) of its upper half.
        labels: of each person, condition name to value; a name may lack.
    """

    image: Floats
    lower: Floats
    upper: Floats
    labels: Sequence[Labels]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Targets:
    """The three tables of one attack; numbers of all are in the cohort's components.

    Args:
        cohort: what the attacker holds.
        train: people it may have been made from.
        holdout: people it was not made from.
        categorical: condition name to its categories.
        continuous: condition name to its (low, high) range.
    """

    cohort: Records
    train: Records
    holdout: Records
    categorical: Mapping[str, tuple[str, ...]]
    continuous: Mapping[str, tuple[float, float]]


def targets(shared: Shared, cohort: Side) -> Targets | None:
    """The tables when `cohort` is attacked; null where (a half of) all its images are alike.

    The synthetic side is what is asked about; train in its place is a cohort of copies.
    """
    scans = {side: shared.small(side, SIDE) for side in (cohort, *_REAL)}
    grid = shared.small_grid(SIDE)
    spaces = [axes(part) for part in _parts(scans[cohort], grid)]
    known = [space for space in spaces if space is not None]
    if len(known) < len(spaces):
        return None

    def of(side: Side, rows: Sequence[int]) -> Records:
        parts = _parts(scans[side][list(rows)], grid)
        image, lower, upper = (a.of(part) for a, part in zip(known, parts, strict=True))
        labels = shared.cases(side).labels
        return Records(image, lower, upper, [labels[i] for i in shared.scans(side)[list(rows)]])

    first = {side: [int(group[0]) for group in shared.patients(side)] for side in _REAL}
    return Targets(
        of(cohort, range(len(scans[cohort]))),
        of("train", first["train"]),
        of("holdout", first["holdout"]),
        shared.sides.categorical,
        shared.sides.continuous,
    )


_REAL: tuple[Side, Side] = ("train", "holdout")


def _parts(scans: Floats, grid: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Whole, lower and upper half of rows from `Shared.small`.

    Along Z, to the top; an axial slice has only Y, to the front.
    """
    n, side = len(scans), grid[2] if grid[2] > 1 else grid[1]
    volumes = scans.reshape(n, -1, side)
    lower, upper = volumes[:, :, : side // 2], volumes[:, :, side // 2 :]
    return scans, lower.reshape(n, -1), upper.reshape(n, -1)
