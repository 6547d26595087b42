"""Copies of training scans in disguise, by which a copies test is asked what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.sides import Cases
from synthmed.metrics.stats import Ints

NOISE = 0.05
"""Standard deviation, as a share of a scan's range."""
MOVED = (1, -2, 1)
"""Voxels along X, Y and Z."""
PALER = 0.6
"""Power of the intensities; they are also brought to seven tenths of their range."""

Scan = np.ndarray
Disguise = Callable[[Scan, np.random.Generator], Scan]


def noisy(x: Scan, rng: np.random.Generator) -> Scan:
    """(C, X, Y, Z) with noise in every channel."""
    spread = np.ptp(x, axis=(1, 2, 3), keepdims=True)
    return np.asarray(x + NOISE * spread * rng.standard_normal(x.shape))


def moved(x: Scan, _rng: np.random.Generator) -> Scan:
    """Moved by whole voxels; what moves in is what lies at the edge."""
    for axis, by in enumerate(MOVED, start=1):
        x = np.take(x, np.clip(np.arange(x.shape[axis]) - by, 0, x.shape[axis] - 1), axis)
    return x


def altered(x: Scan, rng: np.random.Generator) -> Scan:
    """Mirrored, moved and paler."""
    low = x.min(axis=(1, 2, 3), keepdims=True)
    spread = np.maximum(np.ptp(x, axis=(1, 2, 3), keepdims=True), 1e-6)
    paler = low + 0.7 * spread * ((x - low) / spread) ** PALER
    return moved(paler[:, ::-1], rng)


DISGUISES: Mapping[str, Disguise] = {
    "with noise": noisy,
    "moved": moved,
    "mirrored, moved and paler": altered,
}


def disguised(train: Cases, rows: Ints, how: Disguise, key: Key) -> Cases:
    """The scans in a disguise, under no patient's name."""
    volumes = np.empty((len(rows), *train.volumes.shape[1:]), np.float16)
    for i, row in enumerate(rows):
        volumes[i] = how(train.volumes[row].astype(np.float32), key.fold(int(row)).numpy())
    names = np.array([f"disguised{i:02d}" for i in range(len(rows))])
    return Cases(volumes, names, [{} for _ in rows])
