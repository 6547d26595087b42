"""What several metrics need of the same sides: computed when first asked for, then kept.

Distribution metrics see one scan a patient. Cohorts above `MAX_PATIENTS` a side are thinned to
that many patients by key, so that memory and time of the pairwise metrics stay bounded; the
copies test and the membership attack see everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from synthmed.metrics.blocks import Singles, blocks, image_channels, smallest
from synthmed.metrics.copies import (
    Compared,
    Copies,
    GapTest,
    ImageTest,
    Matches,
    match,
)
from synthmed.metrics.descriptor import RESOLUTION, describe
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.similarity import DescriptorSimilarity, ImageSimilarity
from synthmed.metrics.stats import Floats, Ints

Side = Literal["train", "holdout", "synthetic", "blurred"]
"""`blurred` is the holdout after a Gaussian blur of `BLUR_VOXELS`: the known-bad control."""

BLUR_VOXELS = 0.4
BLURRED = "holdout blurred by 0.4 voxel"
MAX_PATIENTS = 2000


class Shared:
    """Caches of one evaluation; hand the same object to every metric.

    Args:
        sides: what is compared.
        as_sampled: the screening of everything that was sampled, before the filter. Without it
            (a cohort of unknown making) the synthetic side itself is screened.
        false_discovery_rate: of the copies test where it has to be run here.
    """

    numbers: str = "descriptors"
    """What `features` are, for the method sentences."""
    control: str = BLURRED
    """What stands behind the side `blurred`, for the same."""

    def __init__(
        self, sides: Sides, as_sampled: Copies | None = None, false_discovery_rate: float = 0.01
    ) -> None:
        self.sides = sides
        self.images = image_channels(sides.channels)
        self.false_discovery_rate = false_discovery_rate
        self._as_sampled = as_sampled
        self._groups: dict[Side, list[Ints]] = {}
        self._scans: dict[Side, Ints] = {}
        self._per_scan: dict[tuple[Side, str], Floats] = {}
        self._distances: dict[tuple[Side, Side], Floats] = {}
        self._scale: tuple[Floats, Floats] | None = None
        self._compared: Compared | None = None

    @property
    def has_holdout(self) -> bool:
        """Whether any patient is held out."""
        return len(self.sides.holdout) > 0

    @property
    def reference(self) -> Side:
        """What the synthetic side is compared with: the holdout, or train where nobody is."""
        return "holdout" if self.has_holdout else "train"

    @property
    def n_holdout(self) -> int | None:
        """Held-out patients, null without any."""
        return len(self.patients("holdout")) if self.has_holdout else None

    def counted(self, n: int) -> str:
        """A number of patients as a note or a method sentence tells it."""
        return str(n)

    def cases(self, side: Side) -> Cases:
        """The scans of a side; `blurred` gives the holdout as it is."""
        if side == "train":
            return self.sides.train
        return self.sides.synthetic if side == "synthetic" else self.sides.holdout

    def patients(self, side: Side) -> list[Ints]:
        """Per patient (in the order of pseudonyms), the rows of `features` that are theirs."""
        if side not in self._groups:
            cases = self.cases(side)
            groups = [np.nonzero(cases.patients == p)[0] for p in sorted(set(cases.patients))]
            if len(groups) > MAX_PATIENTS:
                rng = self.sides.key.fold("thin", self._real(side)).numpy()
                kept = np.sort(rng.permutation(len(groups))[:MAX_PATIENTS])
                groups = [groups[i] for i in kept]
            ends = np.cumsum([len(g) for g in groups])
            self._scans[side] = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
            self._groups[side] = [
                np.arange(end - len(g), end) for g, end in zip(groups, ends, strict=True)
            ]
        return self._groups[side]

    def scans(self, side: Side) -> Ints:
        """The scans behind the rows of `features`, as rows of `cases(side)`."""
        self.patients(side)
        return self._scans[side]

    def blocks(self, side: Side, channels: Sequence[int] | None = None) -> Iterator[Singles]:
        """The kept scans of a side in order, as blocks; by default their image channels."""
        blur = BLUR_VOXELS if side == "blurred" else 0.0
        chosen = self.images if channels is None else channels
        return blocks(self.cases(side), chosen, self.scans(side), blur)

    @property
    def everybody(self) -> Shared:
        """The caches of the whole cohort, of which these may be a part."""
        return self

    def per_scan(
        self,
        side: Side,
        name: str,
        width: int,
        of: Callable[[Singles], Floats],
        channels: Sequence[int] | None = None,
    ) -> Floats:
        """(n_scans, width) numbers of each kept scan of a side; scans are read once a name.

        Args:
            side: one of them.
            name: tells these numbers from others.
            width: numbers a scan.
            of: makes (b, width) numbers from a block (b, C, X, Y, Z).
            channels: which channels a block has; by default image channels.
        """
        whole = self.everybody
        if (side, name) not in whole._per_scan:
            rows = [of(block) for block in whole.blocks(side, channels)]
            whole._per_scan[side, name] = np.concatenate([np.zeros((0, width)), *rows])
        return whole._per_scan[side, name][self.rows(side)]

    def rows(self, side: Side) -> Ints | slice:
        """Which rows of everybody's numbers these are."""
        return slice(None)

    def small_grid(self, voxels: int) -> list[int]:
        """The grid of `small`."""
        return [min(voxels, n) for n in self.sides.train.volumes.shape[2:]]

    def small(self, side: Side, voxels: int) -> Floats:
        """(n_scans, C voxels) area averages of the image channels, at most `voxels` a side."""
        grid = self.small_grid(voxels)
        width = len(self.images) * int(np.prod(grid))
        return self.per_scan(side, f"small {voxels}", width, lambda b: smallest(b, grid))

    def descriptors(self, side: Side) -> Floats:
        """(n_scans, 53 per image channel) descriptors of a side."""
        return self.per_scan(side, "descriptors", len(self.images) * len(RESOLUTION), describe)

    def patient_means(self, side: Side) -> Floats:
        """(n_patients, 53 per image channel): the mean descriptor of each patient's scans."""
        d = self.descriptors(side)
        return np.stack([d[rows].mean(axis=0) for rows in self.patients(side)])

    def features(self, side: Side) -> Floats:
        """Descriptors z-scored on real train, as `descriptor` defines it."""
        if self._scale is None:
            mean, sd = moments(self.descriptors("train"), self.patients("train"))
            self._scale = mean, np.maximum(sd, np.tile(RESOLUTION, len(self.images)))
        mean, scale = self._scale
        return (self.descriptors(side) - mean) / scale

    def distances(self, a: Side, b: Side) -> Floats:
        """(n_a, n_b) Euclidean distances between features."""
        if (a, b) not in self._distances:
            from scipy.spatial.distance import cdist

            self._distances[a, b] = cdist(self.features(a), self.features(b))
        return self._distances[a, b]

    def matches(self) -> Matches:
        """Image similarities of the synthetic side to every real scan (the costly matrix).

        Without the copies test's closer look: it is at as many patients of one side as of the
        other, a larger share of the fewer.
        """
        return self._compare().matches

    def _compare(self) -> Compared:
        if self._compared is None:
            s = self.sides
            view = ImageSimilarity(self.images, device=s.device)
            self._compared = match(s.train, s.holdout, s.synthetic, view)
        return self._compared

    def as_sampled(self) -> Copies:
        """The screening that was handed in, or else that of the synthetic side."""
        if self._as_sampled is None:
            s = self.sides
            key = s.key.fold("copies")
            test = ImageTest(s.train, s.holdout, self.images, key, s.device)
            found = self._compare()
            self._as_sampled = test.find(s.synthetic, self.false_discovery_rate, found)
        return self._as_sampled

    def as_shipped(self) -> Copies:
        """The synthetic side screened again, in descriptor space."""
        s = self.sides
        key = s.key.fold("copies_shipped")
        test = GapTest(s.train, s.holdout, DescriptorSimilarity(self.images), key)
        return test.find(s.synthetic, self.false_discovery_rate)

    @staticmethod
    def _real(side: Side) -> str:
        # the blurred holdout must keep the same patients as the holdout
        return "holdout" if side == "blurred" else side


def moments(features: Floats, groups: Sequence[Ints]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of (n_scans, D) features; each patient weighs the same."""
    weight = np.concatenate([np.full(len(g), 1 / len(g)) for g in groups]) / len(groups)
    mean = weight @ features
    return mean, np.sqrt(weight @ (features - mean) ** 2)


def pick(groups: Sequence[Ints], rng: np.random.Generator) -> Ints:
    """One scan of each patient, drawn evenly."""
    u = rng.random(len(groups))
    return np.array([g[int(x * len(g))] for g, x in zip(groups, u, strict=True)], dtype=np.int64)
