"""People of 8 voxels a side, for what has to be drawn hundreds of times."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from synthmed.metrics.sides import Cases

GRID = (8, 8, 8)
CONDITIONS = {"categorical": {"kind": ("ill", "well")}, "continuous": {"age": (40.0, 80.0)}}


def people(rng: np.random.Generator, n: int, prefix: str, signal: float = 0.05) -> Cases:
    """Smooth individual images; half of people have a bright spot, and age brightens another."""
    volumes = 0.5 + 0.1 * rng.standard_normal((n, 1, *GRID))
    volumes = gaussian_filter(volumes, (0, 0, 1, 1, 1))
    volumes = 0.5 + 3 * (volumes - 0.5) + 0.02 * rng.standard_normal(volumes.shape)
    ill, age = rng.random(n) < 0.5, rng.uniform(40, 80, n)
    volumes[ill, :, 1:4, 2:6, 2:6] += signal
    volumes[:, :, 5:7, 2:6, 2:6] += 2 * signal * (age[:, None, None, None, None] - 60) / 20
    labels: list[dict[str, str | float]] = [
        {"kind": "ill" if i else "well", "age": float(a)} for i, a in zip(ill, age, strict=True)
    ]
    names = np.array([f"{prefix}{i:03d}" for i in range(n)], dtype=str)
    return Cases(volumes.astype(np.float16), names, labels)


def copied(train: Cases, noise: float, rng: np.random.Generator) -> Cases:
    """A cohort that is the training set, with noise and with its labels."""
    volumes = train.volumes + noise * rng.standard_normal(train.volumes.shape)
    names = np.array([f"syn{i:03d}" for i in range(len(train))], dtype=str)
    return Cases(volumes.astype(np.float16), names, train.labels)
