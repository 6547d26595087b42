"""Synthetic volumes on disk: integers with a fresh header, one file an image channel or mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthmed.artifacts import ChannelInfo, Sample
from synthmed.formats import nifti
from synthmed.types import Affine

UNIT = 1000
"""Prepared intensity 1 (the high percentile of a scan) as an integer in a written volume."""


def volume_names(channels: Sequence[ChannelInfo]) -> list[str]:
    """The files a sample consists of: every image channel, and every mask once."""
    return list(dict.fromkeys(c.mask or c.name for c in channels))


def encode(
    volume: npt.NDArray[np.float32], channels: Sequence[ChannelInfo]
) -> dict[str, npt.NDArray[np.int16]]:
    """(C, X, Y, Z) as the integer volumes that are written: images in `UNIT`s, masks as labels.

    A voxel takes the label whose channel is largest, the background being 1 minus their sum.
    """
    out: dict[str, npt.NDArray[np.int16]] = {}
    for name in volume_names(channels):
        rows = [i for i, c in enumerate(channels) if (c.mask or c.name) == name]
        if channels[rows[0]].mask is None:
            out[name] = np.round(volume[rows[0]] * UNIT).astype(np.int16)
        else:
            parts = volume[rows]
            values = np.array([0] + [channels[i].label_value or 0 for i in rows])
            stack = np.concatenate([1 - parts.sum(0, keepdims=True), parts])
            out[name] = values[stack.argmax(0)].astype(np.int16)
    return out


def decode(
    volumes: Mapping[str, npt.NDArray[np.int16]], channels: Sequence[ChannelInfo]
) -> npt.NDArray[np.float16]:
    """The inverse of `encode`, up to its rounding: (C, X, Y, Z) in prepared intensity."""
    return np.stack(
        [
            (volumes[c.name].astype(np.float32) / UNIT).astype(np.float16)
            if c.mask is None
            else (volumes[c.mask] == c.label_value).astype(np.float16)
            for c in channels
        ]
    )


def write(
    folder: Path,
    files: Mapping[str, str],
    volume: npt.NDArray[np.float32],
    channels: Sequence[ChannelInfo],
    affine: Affine,
) -> None:
    """Write one sample; each file appears under its name only when it is whole.

    Args:
        folder: where to.
        files: image channel or mask name to file name.
        volume: (C, X, Y, Z) in prepared intensity.
        channels: what each of the C channels is.
        affine: (4, 4) of the grid.
    """
    for name, values in encode(volume, channels).items():
        temporary = folder / f".{files[name]}"
        nifti.write(temporary, values, affine)
        temporary.rename(folder / files[name])


def read(
    samples: Sequence[Sample], folders: Sequence[Path], channels: Sequence[ChannelInfo]
) -> npt.NDArray[np.float16]:
    """The volumes of samples, (n, C, X, Y, Z) in prepared intensity."""
    return np.stack(
        [
            decode(
                {
                    name: nifti.read(folder / file).data.astype(np.int16)
                    for name, file in sample.files.items()
                },
                channels,
            )
            for sample, folder in zip(samples, folders, strict=True)
        ]
    )
