"""A tiny cohort with what matters here: shared anatomy, individual anatomy, scanner noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

from synthmed.artifacts import ChannelInfo
from synthmed.keys import Key
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.sides import Cases, Sides

Grid = tuple[int, int, int]
GRID: Grid = (20, 22, 20)


def scan(
    rng: np.random.Generator, individual: np.ndarray, size: float = 1.0, grid: Grid = GRID
) -> np.ndarray:
    """A head: an ellipsoid of tissue with shared folds, individual folds and fresh noise."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij")
    x, y, z = (a / size for a in axes)
    radius = np.sqrt((x / 0.85) ** 2 + (y / 0.95) ** 2 + (z / 0.9) ** 2)
    shared = 0.12 * np.cos(7 * x) * np.cos(6 * y + 1) + 0.1 * np.sin(5 * z)
    head = 1 / (1 + np.exp((radius - 0.85) / 0.05))
    ventricle = 0.35 * np.exp(-((x / 0.25) ** 2 + (y / 0.35) ** 2 + (z / 0.3) ** 2))
    image = head * (0.6 + shared + individual - ventricle)
    return image + 0.02 * rng.standard_normal(grid)


def person(rng: np.random.Generator, n_scans: int = 1, grid: Grid = GRID) -> np.ndarray:
    """(n_scans, 1, X, Y, Z) float16 scans of one person, who differs from others in folds."""
    fold = gaussian_filter(rng.standard_normal(grid), 1.5 * grid[0] / GRID[0])
    size = 1 + 0.03 * rng.standard_normal()
    return np.stack([scan(rng, 0.12 * fold / fold.std(), size, grid) for _ in range(n_scans)])[
        :, None
    ].astype(np.float16)


def cases(
    rng: np.random.Generator, n: int, prefix: str, twice: int = 0, grid: Grid = GRID
) -> Cases:
    """`n` people named prefix000..., the first `twice` of whom were scanned twice."""
    volumes, patients = [], []
    for i in range(n):
        scans = person(rng, 2 if i < twice else 1, grid)
        volumes.append(scans)
        patients += [f"{prefix}{i:03d}"] * len(scans)
    stacked = np.concatenate(volumes) if n else np.zeros((0, 1, *grid), dtype=np.float16)
    return Cases(stacked, np.array(patients, dtype=str), [{} for _ in patients])


def made(volumes: np.ndarray, labels: list[dict[str, str | float]] | None = None) -> Cases:
    """Synthetic cases from (n, 1, X, Y, Z), each its own patient."""
    names = np.array([f"syn{i:04d}" for i in range(len(volumes))])
    return Cases(volumes.astype(np.float16), names, labels or [{} for _ in names])


def sides(train: Cases, holdout: Cases, synthetic: Cases, resamples: int = 100, **given) -> Sides:
    return Sides(
        train=train,
        holdout=holdout,
        synthetic=synthetic,
        channels=(ChannelInfo("T1w"),),
        spacing_mm=(1.0, 1.0, 1.0),
        categorical=given.get("categorical", {}),
        continuous=given.get("continuous", {}),
        key=Key.root(given.get("seed", 0)),
        seed=given.get("seed", 0),
        resamples=resamples,
        device=given.get("device", "cpu"),
    )


Disguise = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def moved(x: np.ndarray, by: tuple[int, int, int]) -> np.ndarray:
    return np.roll(x, by, (0, 1, 2))


DISGUISES: dict[str, Disguise] = {
    "exact": lambda x, rng: x,
    "noise": lambda x, rng: x + 0.05 * rng.standard_normal(x.shape),
    "blur": lambda x, rng: gaussian_filter(x, 0.7),
    "flip": lambda x, rng: x[::-1],
    "shift": lambda x, rng: moved(x, (1, -2, 1)),
    "intensity": lambda x, rng: 0.1 + 0.7 * np.clip(x, 0, None) ** 0.6,
    "combined": lambda x, rng: (
        moved(0.8 * np.clip(x[::-1], 0, None) ** 0.8, (1, 0, -1))
        + 0.02 * rng.standard_normal(x.shape)
    ),
}
"""What may be done to a copy, intensities being about 0 to 1."""


class Points(Shared):
    """People who are points, one scan each: what metrics see of scans is given, (n, D) a side."""

    def __init__(self, seed: int, resamples: int = 100, **points: np.ndarray) -> None:
        def people(side: str) -> Cases:
            n = len(points[side])
            names = np.array([f"{side[0]}{i:04d}" for i in range(n)], dtype=str)
            return Cases(np.zeros((n, 1, 1, 1, 1), np.float16), names, [{} for _ in names])

        used = [people(side) for side in ("train", "holdout", "synthetic")]
        super().__init__(sides(*used, resamples, seed=seed))
        self.points = points

    def features(self, side: Side) -> np.ndarray:
        return self.points[side]

    def small(self, side: Side, voxels: int) -> np.ndarray:
        return self.points[side]
