"""Two similarities of scans, made so that a disguised copy still matches its original.

`ImageSimilarity` asks whether a transform of one scan shows the detail of another; in two views,
of all voxels and of tissue, it screens what was sampled. `DescriptorSimilarity` compares
descriptors; it retests what ships.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from synthmed.metrics.blocks import Singles, block_means, blocks
from synthmed.metrics.descriptor import RESOLUTION, describe
from synthmed.metrics.sides import Cases
from synthmed.metrics.stats import Floats, Ints

SIDE = 24
"""Sides are averaged down to this many voxels. What identifies a person is larger than that
(1/24 of the field of view), noise and compression are smaller, and a copy stays a copy."""
HIGH_PASS_VOXELS = 3.0
"""Gaussian of the background that is removed, in voxels of the averaged grid."""
LEVELS = 4096
"""Grey levels that ranks are taken over."""
HALVES = tuple(itertools.product((0, 1), repeat=3))
"""Along which axes the averaged grid of the view of tissue lies half a voxel ahead."""
BACKGROUND = 0.1
"""Share of a scan's range of intensity below which a voxel shows no tissue."""
RANGE_QUANTILES = (0.005, 0.995)
"""What counts as a scan's range."""
LARGEST_R = 0.9999
"""Correlations count as equal beyond this: rounding to float16 costs a copy as much."""
CLOSEST = 12
"""Patients of either side at which a scan is looked at closer."""
Features = npt.NDArray[Any]


class Similarity(Protocol):
    """Scores of query scans against reference scans; larger is more alike.

    `features` reads scans once; `fit` and `compare` work on what it returned.
    """

    @property
    def name(self) -> str:
        """Short name, for records."""
        ...

    @property
    def same(self) -> float:
        """The score of a scan with itself."""
        ...

    def features(self, cases: Cases) -> Features:
        """(n_scans, ...) what is compared of each scan."""
        ...

    def fit(self, train: Features) -> Similarity:
        """The similarity with whatever it learns from real train."""
        ...

    def compare(self, queries: Features, references: Features) -> Scores:
        """(n_queries, n_references) scores."""
        ...

    def closer(self, found: Scores, queries: Looked, references: Looked) -> Floats:
        """The scores again, of each query's best few by a closer look; none gets smaller."""
        ...


class Scores(NamedTuple):
    """How alike scans are.

    Args:
        best: (n_queries, n_references); -inf where nobody is to look.
        where: the same of which move is the best, for a closer look; null where nothing moves.
    """

    best: Floats
    where: Ints | None = None


class Looked(NamedTuple):
    """Scans and what was made of them.

    Args:
        cases: a side.
        rows: (n,) which of its scans.
        features: (n, ...) of these.
    """

    cases: Cases
    rows: Ints
    features: Features


@dataclass(frozen=True)
class ImageSimilarity:
    """Best high-pass correlation over flip, shift, small affine and monotone intensity, Fisher's z.

    A scan is averaged to at most 24 voxels a side, its grey values are replaced by the normal
    scores of their ranks (which no monotone change of intensity alters), and a Gaussian background
    (3 voxels) is subtracted. The score is atanh(min(r, 0.9999)), r the largest Pearson correlation
    of the reference with the query under a bank of transforms, zero where nothing moves in:
    left-right flip or not, times either all shifts up to 2 voxels along X, Y and Z at once (125),
    or scale 0.95 or 1.05 or a rotation by -6 or 6 degrees about X, Y or Z, each with no shift or
    one voxel along one axis (8 x 7): 362 in all. Two voxels are 8 % of the field of view. A
    constant scan scores 0. Several image channels are each normalised, then correlated together.

    The view of tissue sets the background to one value and shifts by half voxels, up to a length
    of two (257 a flip). Half a voxel is not interpolated: the scan is averaged on a grid that lies
    half a voxel ahead, as a moved copy was, so that the match stays sharp. (At 24 voxels a side and
    fewer there is nothing to average, and it is linear interpolation.)

    Fisher's z because heads are alike: where everybody correlates at 0.8 a difference of r leaves
    an exact copy a gap of at most 0.2, close to what honest samples reach. atanh(r) is, but for a
    constant, minus the log of the distance of two unit vectors, so a gap is a ratio of distances.

    A copy that was moved lies between whole shifts, the more so the finer the scans are. `closer`
    moves each query as far as its best matches ask for, averages it there anew and keeps the larger
    correlation (`moves.closer_correlations`). Not in the view of tissue, where it brings strangers
    nearer too, and not where there is nothing to average.

    One matrix product a transform and chunk of queries; memory is that of features, 28 KB a scan
    and channel, in the view of tissue 221 KB, and of one chunk.

    Args:
        channels: image channels.
        tissue: the view of tissue instead of that of all voxels.
        device: torch device that compares; figures agree to the rounding of float32.
    """

    channels: tuple[int, ...]
    tissue: bool = False
    device: str = "cpu"
    same: float = float(np.arctanh(LARGEST_R))

    @property
    def name(self) -> str:
        """Which of the two views."""
        return "tissue" if self.tissue else "image"

    def features(self, cases: Cases) -> Features:
        """(n, G, C, x, y, z) float16 high-pass normal scores, mean 0 and variance 1 a channel.

        G is 8 in the view of tissue, a grid for each of `HALVES`, and else 1.
        """
        size = [min(SIDE, n) for n in cases.volumes.shape[2:]]
        grids = HALVES if self.tissue else HALVES[:1]
        out = np.empty((len(cases), len(grids), len(self.channels), *size), dtype=np.float16)
        done = 0
        for block in blocks(cases, self.channels):
            rows = slice(done, done := done + len(block))
            for k, (x, y, z) in enumerate(grids):
                out[rows, k] = self._seen(block, size, (x / 2, y / 2, z / 2))
        return out

    def _seen(self, block: Singles, size: Sequence[int], ahead: Sequence[float]) -> Singles:
        """(b, C, x, y, z) of (b, C, X, Y, Z), on a grid of `size` that lies so far ahead."""
        means = block_means(block, size, ahead)
        return np.asarray(_detail(_tissue(means) if self.tissue else means))

    def fit(self, train: Features) -> ImageSimilarity:
        """Nothing is learned."""
        return self

    def compare(self, queries: Features, references: Features) -> Scores:
        """(n_queries, n_references) scores, 0 for unrelated scans."""
        from synthmed.metrics.moves import best_correlations

        best, where = best_correlations(queries, references[:, 0], self.device)
        return Scores(_fisher(best), where)

    def closer(self, found: Scores, queries: Looked, references: Looked) -> Floats:
        """(n_queries, n_references) scores; each query's `CLOSEST` patients are looked at again.

        Of each the scan that is the most alike: who has many scans must not take the place of
        others, with whom the copies test compares the best.

        Raises:
            ValueError: `found` does not say which moves are the best.
        """
        from synthmed.metrics.moves import closer_correlations

        size = queries.features.shape[3:]
        if self.tissue or queries.cases.volumes.shape[2:] == size:
            return found.best
        if found.where is None:
            raise ValueError("ImageSimilarity.closer: pass what compare returned")
        out, people = found.best.copy(), references.cases.patients[references.rows]
        for i, row in enumerate(queries.rows):
            order = np.argsort(-out[i], kind="stable")
            order = order[np.isfinite(out[i, order])]
            _, first = np.unique(people[order], return_index=True)
            nearest = order[np.sort(first)[:CLOSEST]]
            if not len(nearest):
                continue
            (block,) = blocks(queries.cases, self.channels, np.array([row]))

            def again(ahead: Sequence[float], mirrored: bool, block: Singles = block) -> Features:
                turned = block[:, :, ::-1] if mirrored else block
                return np.asarray(self._seen(turned, size, ahead)[0], dtype=np.float16)

            r = closer_correlations(
                queries.features[i, 0],
                references.features[nearest, 0],
                found.where[i, nearest],
                again,
            )
            out[i, nearest] = np.maximum(out[i, nearest], _fisher(r))
        return out


@dataclass(frozen=True)
class DescriptorSimilarity:
    """Minus the log distance of z-scored descriptors: -log(d + 0.01 sqrt(n_features)).

    A logarithm, so that the gap between two best matches is a ratio of distances: a sample far
    from everyone (blurred, say) is then not nearer to train by a wide margin only because all its
    distances are large. The offset is a difference of 1 % of a standard deviation in each number.

    Args:
        channels: image channels.
        mean: of the descriptors of real train; set by `fit`.
        scale: what they are divided by; set by `fit`.
    """

    channels: tuple[int, ...]
    mean: Floats | None = None
    scale: Floats | None = None
    name: str = "descriptor"

    @property
    def same(self) -> float:
        """The score of a scan with itself."""
        return -float(np.log(0.01 * np.sqrt(len(self.channels) * len(RESOLUTION))))

    def features(self, cases: Cases) -> Floats:
        """(n, 53 C) descriptors."""
        empty = np.zeros((0, len(self.channels) * len(RESOLUTION)))
        return np.concatenate([empty, *(describe(b) for b in blocks(cases, self.channels))])

    def fit(self, train: Features) -> DescriptorSimilarity:
        """Mean and scale of the descriptors of every scan of train."""
        scale = np.maximum(train.std(axis=0), np.tile(RESOLUTION, len(self.channels)))
        return DescriptorSimilarity(self.channels, train.mean(axis=0), scale)

    def compare(self, queries: Features, references: Features) -> Scores:
        """(n_queries, n_references) scores.

        Raises:
            ValueError: it has not been fitted.
        """
        from scipy.spatial.distance import cdist

        if self.mean is None or self.scale is None:
            raise ValueError("DescriptorSimilarity.compare: call fit(features of train) first")
        a, b = ((f - self.mean) / self.scale for f in (queries, references))
        return Scores(np.asarray(-np.log(cdist(a, b) + 0.01 * np.sqrt(len(self.mean)))))

    def closer(self, found: Scores, queries: Looked, references: Looked) -> Floats:
        """The scores as they are: a descriptor is that of the whole scan."""
        return found.best


def _fisher(r: Floats) -> Floats:
    return np.asarray(np.arctanh(np.clip(r, -LARGEST_R, LARGEST_R)))


def normal_scores(volumes: Singles) -> Singles:
    """Standard normal quantile of each value's mid-rank within its own volume (last three axes).

    Ranks are taken over `LEVELS` equal steps of the volume's range; a constant volume becomes 0.
    """
    from scipy.special import ndtri

    out = np.zeros_like(volumes)
    flat, target = volumes.reshape(-1, volumes[0, 0].size), out.reshape(-1, volumes[0, 0].size)
    for row, score in zip(flat, target, strict=True):
        low, high = float(row.min()), float(row.max())
        if high - low <= 1e-6:
            continue
        level = ((row - low) * ((LEVELS - 1) / (high - low)) + 0.5).astype(np.int64)
        counts = np.bincount(level, minlength=LEVELS)
        middle = (np.cumsum(counts) - counts / 2) / len(row)
        score[:] = ndtri(np.clip(middle, 0.5 / len(row), 1 - 0.5 / len(row)))[level]
    return out


def _detail(block: Singles) -> Singles:
    from scipy.ndimage import gaussian_filter

    scores = normal_scores(block)
    sigma = (0, 0, HIGH_PASS_VOXELS, HIGH_PASS_VOXELS, HIGH_PASS_VOXELS)
    detail = scores - gaussian_filter(scores, sigma, mode="nearest")
    detail -= detail.mean(axis=(2, 3, 4), keepdims=True)
    spread = detail.std(axis=(2, 3, 4), keepdims=True)
    return np.asarray(np.divide(detail, spread, out=np.zeros_like(detail), where=spread > 1e-4))


def _tissue(block: Singles) -> Singles:
    """(b, C, x, y, z) with every voxel of the background at one value."""
    low, high = np.quantile(block, RANGE_QUANTILES, axis=(2, 3, 4), keepdims=True)
    least = (low + BACKGROUND * (high - low)).astype(np.float32)
    return np.asarray(np.maximum(block, least), dtype=np.float32)
