"""The three sides that every metric compares: training, held-out and synthetic cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthmed.artifacts import ChannelInfo
from synthmed.keys import Key
from synthmed.types import Labels


@dataclass(frozen=True)
class Cases:
    """Scans of one side.

    Args:
        volumes: (n_scans, C, X, Y, Z) float16 or float32, possibly a memory map.
        patients: (n_scans,) who each scan is of; a synthetic case is its own patient.
        labels: per scan, condition name to value.
    """

    volumes: npt.NDArray[np.floating]
    patients: npt.NDArray[np.str_]
    labels: Sequence[Labels]

    def __len__(self) -> int:
        return len(self.patients)


@dataclass(frozen=True)
class Sides:
    """What is compared, on one grid and in one intensity scale.

    Args:
        train: every scan the model may have learned from.
        holdout: every scan of the held-out patients; may be empty (`assess` without a split).
        synthetic: what is judged.
        channels: what each of the C channels is.
        spacing_mm: voxel size.
        categorical: condition name to its categories.
        continuous: condition name to its (low, high) range.
        key: all resampling is drawn from folds of it.
        seed: the number that `key` came from, printed with every estimate.
        resamples: subsamples and permutations behind each interval.
        device: torch device that compares images with images.
    """

    train: Cases
    holdout: Cases
    synthetic: Cases
    channels: Sequence[ChannelInfo]
    spacing_mm: tuple[float, float, float]
    categorical: Mapping[str, tuple[str, ...]]
    continuous: Mapping[str, tuple[float, float]]
    key: Key
    seed: int
    resamples: int
    device: str = "cpu"
