"""A cheap segmenter: what the images and masks of some scans teach about the masks of another.

Every voxel is read by multinomial logistic regression from its surroundings: the intensity,
Gaussian smooths at three scales with the size of their gradient and their Laplacian, of every image
channel, whitened and reduced to at most `COMPONENTS` principal components, and the place on the
grid; all of these, their squares and their products. It learns from `VOXELS` a scan: as many of
each region, of the shell about them and of the rest, weighted back to how many there are. The
labels of one mask exclude one another and are one problem; another mask is a problem of its own, so
that masks may overlap.

Why this one: of six that learn in seconds it was the best with many scans and within 0.01 of the
best with eight, ten times as quick as boosted trees; it is linear, so that a scan is read by fifty
segmenters at once for the price of a product of matrices. It is no nnU-Net, and need not be: it
compares what cohorts teach.

Source: features as in Sommer et al. 2011 (ilastik); Hastie et al. 2009, section 4.4 (the model).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from synthmed.metrics.blocks import Singles, block_means
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Bools, Floats, Ints

Maps = npt.NDArray[np.uint16]

SIDE = 64
"""Voxels a side of the grid that a segmenter sees, at most; finer scans are averaged to it."""
SCALES = (1.0, 2.0, 4.0)
"""Standard deviations of the smooths, in sides of a voxel where it is shortest."""
COMPONENTS = 12
"""Principal components of the image features, so that more channels cost no more."""
VOXELS = 360
"""A scan's voxels that teach."""
SHELL_VOXELS = 3
"""How far from a region the background counts as near it, and is taught as often as a region."""
FARTHEST = 8.0
"""Standard deviations that a feature is clipped to: a scan that diverged must not overflow."""
LEAST_SPREAD = 1e-3
"""Standard deviation that a feature has at least, in prepared intensity."""
CHUNK_VOXELS = 16_384
"""Voxels read at a time: some 20 MB for fifty segmenters."""
NEVER = -1e9
"""Log odds of a label that was never taught."""


@dataclass(frozen=True)
class Layout:
    """Where images and masks are, and the grid they are read on.

    Args:
        images: channels that are images.
        masks: of each mask, the channels that are its labels.
        grid: voxels (X, Y, Z) that a segmenter sees.
        spacing_mm: of that grid.
    """

    images: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]
    grid: tuple[int, ...]
    spacing_mm: tuple[float, ...]

    @classmethod
    def of(cls, sides: Sides) -> Layout:
        """All masks, whether a cohort draws them or is given them: either way the pair teaches."""
        channels = list(enumerate(sides.channels))
        files = dict.fromkeys(c.mask for _, c in channels if c.mask is not None)
        full = sides.train.volumes.shape[2:]
        grid = tuple(min(SIDE, n) for n in full)
        return cls(
            images=tuple(i for i, c in channels if c.mask is None),
            masks=tuple(tuple(i for i, c in channels if c.mask == file) for file in files),
            grid=grid,
            spacing_mm=tuple(
                s * n / g for s, n, g in zip(sides.spacing_mm, full, grid, strict=True)
            ),
        )

    @property
    def regions(self) -> tuple[int, ...]:
        """Channels of all labels, mask after mask: the order of regions."""
        return tuple(i for mask in self.masks for i in mask)

    @property
    def channels(self) -> tuple[int, ...]:
        """What `split` takes: images, then regions."""
        return (*self.images, *self.regions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Labels of each mask."""
        return tuple(map(len, self.masks))

    def split(self, scan: Singles) -> tuple[Singles, Maps]:
        """(C, X, Y, Z) on its own grid: images (I, X, Y, Z) and (M, voxels) label maps on `grid`.

        C are the `channels`.
        """
        small = block_means(scan[None], self.grid)[0]
        n = len(self.images)
        return small[:n], self.labels(small[n:].reshape(len(small) - n, -1))

    def labels(self, shares: npt.NDArray[np.floating]) -> Maps:
        """(R, voxels) shares of each region as (M, voxels) label maps, 0 the background.

        A voxel takes the label whose share is largest, as masks are written; the background's is
        1 less the sum of its mask.
        """
        out, first = [], 0
        for size in self.sizes:
            own = shares[first : first + size]
            first += size
            out.append(np.concatenate([1 - own.sum(0, keepdims=True), own]).argmax(0))
        return np.stack(out).astype(np.uint16)

    def inside(self, labels: Maps) -> Bools:
        """(R, voxels) where each region is, of (M, voxels) label maps."""
        return np.stack([labels[m] == k + 1 for m, n in enumerate(self.sizes) for k in range(n)])


def surroundings(images: Singles, spacing_mm: Sequence[float]) -> Singles:
    """(voxels, 10 I + 3) features of every voxel of one scan (I, X, Y, Z); the place comes last."""
    from scipy.ndimage import gaussian_filter

    apart = [s / min(spacing_mm) for s in spacing_mm]
    out = []
    for image in images:
        out.append(image)
        smooth, had = image, 0.0
        for scale in SCALES:
            more = math.sqrt(scale**2 - had**2)  # variances of Gaussians add up
            smooth = gaussian_filter(smooth, [more / a for a in apart], truncate=3.0)
            had = scale
            slopes = [_slope(smooth, axis, apart[axis]) for axis in range(3)]
            curve = sum(_slope(s, axis, apart[axis]) for axis, s in enumerate(slopes))
            out += [smooth, scale * np.sqrt(sum(s**2 for s in slopes)), scale**2 * curve]
    ends = [math.sqrt(3) * np.linspace(-1, 1, n, dtype=np.float32) for n in images.shape[1:]]
    out += list(np.meshgrid(*ends, indexing="ij"))
    return np.stack([f.ravel() for f in out], axis=1).astype(np.float32)


def _slope(image: Singles, axis: int, apart: float) -> Singles:
    if image.shape[axis] < 2:
        return np.zeros_like(image)
    return np.asarray(np.gradient(image, apart, axis=axis), dtype=np.float32)


class Lesson(NamedTuple):
    """What one scan teaches: (v, F) features, (v, M) labels, (v,) voxels that each stands for."""

    features: Singles
    labels: Maps
    weights: Singles


def lesson(features: Singles, labels: Maps, layout: Layout, rng: np.random.Generator) -> Lesson:
    """Voxels of a scan, as many of every region, of their shell and of the rest.

    Args:
        features: (voxels, F) from `surroundings`.
        labels: (M, voxels).
        layout: of the scan.
        rng: draws them. A voxel in several masks is drawn as one of the smallest region.
    """
    from scipy.ndimage import binary_dilation

    free = np.ones(labels.shape[1], dtype=bool)
    groups = []
    for own in sorted(layout.inside(labels), key=np.count_nonzero):
        groups.append(np.flatnonzero(own & free))
        free &= ~own
    taken = ~free.reshape(layout.grid)
    near = free & binary_dilation(taken, iterations=SHELL_VOXELS).ravel()
    groups += [np.flatnonzero(near), np.flatnonzero(free & ~near)]
    groups = [g for g in groups if len(g)]
    each = max(1, VOXELS // len(groups))
    chosen = [rng.choice(g, min(each, len(g)), replace=False, shuffle=False) for g in groups]
    weights = [np.full(len(c), len(g) / len(c)) for c, g in zip(chosen, groups, strict=True)]
    at = np.concatenate(chosen)
    return Lesson(features[at], labels[:, at].T, np.concatenate(weights).astype(np.float32))


class Basis:
    """What segmenters are linear in: whitened features, their squares and products.

    One basis for all segmenters of a comparison; it changes what they learn only through the ridge.

    Args:
        lessons: of the real training scans.
    """

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        x = np.concatenate([one.features for one in lessons]).astype(np.float64)
        places = x.shape[1] - 3
        self.mean = x.mean(axis=0)
        self.mean[places:] = 0
        spread = np.maximum(x[:, :places].std(axis=0), LEAST_SPREAD)
        z = (x[:, :places] - self.mean[:places]) / spread
        values, axes = np.linalg.eigh(z.T @ z / len(z))
        kept = np.argsort(-values, kind="stable")[:COMPONENTS]
        # a direction without any spread stays small instead of being blown up
        whitened = axes[:, kept] / np.sqrt(np.maximum(values[kept], 1e-4))
        self.matrix = np.zeros((x.shape[1], len(kept) + 3))
        self.matrix[:places, : len(kept)] = whitened / spread[:, None]
        self.matrix[places:, len(kept) :] = np.eye(3)

    def __call__(self, features: Singles) -> Singles:
        """(v, F) features as (v, 1 + D + D (D + 1) / 2): one, each, and products of two."""
        z = (features - self.mean.astype(np.float32)) @ self.matrix.astype(np.float32)
        z_DV = np.ascontiguousarray(np.clip(z, -FARTHEST, FARTHEST).T)
        d = len(z_DV)
        out_QV = np.empty((1 + d + d * (d + 1) // 2, len(z)), np.float32)
        out_QV[0] = 1
        out_QV[1 : 1 + d] = z_DV
        row = 1 + d
        for i in range(d):
            np.multiply(z_DV[i], z_DV[i:], out=out_QV[row : row + d - i])
            row += d - i
        return out_QV.T


def teach(
    basis: Basis, lessons: Sequence[Lesson], weights: Floats, sizes: Sequence[int]
) -> Singles:
    """A segmenter: (Q, sum of 1 + labels) log odds by `basis`, mask after mask.

    Args:
        basis: of the comparison.
        lessons: one a scan, at least one.
        weights: of each scan.
        sizes: labels of each mask. A label that no lesson holds is never said.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = basis(np.concatenate([one.features for one in lessons]))
    y = np.concatenate([one.labels for one in lessons])
    w = np.concatenate([one.weights * f for one, f in zip(lessons, weights, strict=True)])
    w = (w / w.mean()).astype(np.float32)
    out = []
    for m, size in enumerate(sizes):
        odds = np.zeros((x.shape[1], 1 + size), np.float32)
        known = np.unique(y[:, m])
        odds[0, np.setdiff1d(np.arange(1 + size), known)] = NEVER
        if len(known) > 1:
            model = LogisticRegression(C=1.0, max_iter=100)
            with warnings.catch_warnings():
                # the last steps move few voxels, and all segmenters take the same number at most
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x[:, 1:], y[:, m], sample_weight=w)
            told = known[1:] if len(known) == 2 else known  # of two, the odds of the second
            odds[1:, told] = model.coef_.T
            odds[0, told] = model.intercept_
        out.append(odds)
    return np.concatenate(out, axis=1)


def read(
    basis: Basis, segmenters: Sequence[Singles], features: Singles, sizes: Sequence[int]
) -> Maps:
    """(S, M, voxels) label maps that each of S segmenters sees in one scan."""
    every = np.stack(segmenters, axis=1)  # (Q, S, labels)
    out = np.empty((len(segmenters), len(sizes), len(features)), np.uint16)
    ends = np.cumsum([0, *(1 + size for size in sizes)])
    for first in range(0, len(features), CHUNK_VOXELS):
        part = slice(first, first + CHUNK_VOXELS)
        odds = basis(features[part]) @ every.reshape(len(every), -1)
        odds = odds.reshape(len(odds), len(segmenters), -1)
        for m, (a, b) in enumerate(itertools.pairwise(ends)):
            out[:, m, part] = odds[:, :, a:b].argmax(axis=2).T
    return out


def dice(seen: Maps, own: Maps, sizes: Sequence[int]) -> Floats:
    """(R,) Dice coefficients 2 |A and B| / (|A| + |B|) of two sets of label maps (M, voxels).

    Two regions without any voxel agree that nothing is there: 1. Where one alone is empty, 0.

    Source: Dice 1945.
    """
    out: list[Floats] = []
    for a, b, size in zip(seen, own, sizes, strict=True):
        pairs: Ints = np.bincount(
            a.astype(np.int64) * (1 + size) + b, minlength=(1 + size) ** 2
        ).reshape(1 + size, 1 + size)
        both = pairs.sum(axis=0) + pairs.sum(axis=1)
        same = 2.0 * np.diag(pairs)
        out.append(np.divide(same, both, out=np.ones(1 + size), where=both > 0)[1:])
    return np.concatenate(out)
