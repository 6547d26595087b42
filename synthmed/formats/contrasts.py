"""Several contrasts of one session as the channels of one scan, put together by their headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from synthmed.config import Channel, Select
from synthmed.formats import selection
from synthmed.formats.grid import corners_apart, resample
from synthmed.formats.nifti import Image, compact
from synthmed.formats.refusal import Refused
from synthmed.formats.stack import SAME_MM
from synthmed.formats.volumes import Volume
from synthmed.types import Affine

MIN_OVERLAP = 0.5
"""Share of the first channel's voxels that every other one has to cover."""


@dataclass
class Sorted:
    """What becomes of volumes.

    Args:
        scans: whose each is, and its volume for every channel, in the order of the config.
        refused: other volumes, whose they are and why.
    """

    scans: list[tuple[str, dict[str, Volume]]] = field(default_factory=list)
    refused: list[tuple[Volume, str, Refused]] = field(default_factory=list)


def sort(channels: Mapping[str, Channel], found: Iterable[tuple[Volume, str]]) -> Sorted:
    """Volumes sorted into scans, one of a session of a person.

    Nothing is guessed: a volume that fits two channels, a session with two volumes for a channel
    or with none, and volumes that do not share one frame of reference are refused.

    Args:
        channels: each with a `select`.
        found: volumes and whose they are.
    """
    out = Sorted()
    sessions: dict[tuple[str, tuple[str, str]], dict[str, list[Volume]]]
    sessions = defaultdict(lambda: {name: [] for name in channels})
    for volume, person in found:
        fitting = [n for n, c in channels.items() if _fits(c, volume)]
        if len(fitting) == 1:
            sessions[person, volume.slices[0].study][fitting[0]].append(volume)
            continue
        reason = Refused("not_requested", "It fits none of data.channels.")
        if fitting:
            reason = Refused("channel_ambiguous", "It fits more than one of data.channels.")
        out.refused.append((volume, person, reason))
    for (person, _), by_channel in sessions.items():
        if why := _unusable(by_channel):
            own = [volume for volumes in by_channel.values() for volume in volumes]
            out.refused += [(volume, person, why) for volume in own]
        else:
            out.scans.append((person, {name: v for name, (v,) in by_channel.items()}))
    return out


def together(images: Mapping[str, Image]) -> dict[str, Image]:
    """Every channel on the grid of the first, by where the headers put it.

    Others are interpolated linearly, and blurred before where their voxels are smaller.

    Raises:
        Refused: one of them covers too little of the first.
    """
    first, *_ = images.values()
    return {
        name: image if _same_grid(first, image) else _moved(image, first)
        for name, image in images.items()
    }


def _fits(channel: Channel, volume: Volume) -> bool:
    return selection.unwanted(channel.select or Select(), volume) is None


def _unusable(by_channel: Mapping[str, list[Volume]]) -> Refused | None:
    """Why the volumes of a session are no scan."""
    for name, volumes in by_channel.items():
        if not volumes:
            return Refused("channel_missing", f"Its session has no {name}.")
        if len(volumes) > 1:
            return Refused("channel_ambiguous", f"Its session has {len(volumes)} for {name}.")
    if len(by_channel) == 1:
        return None
    frames = {s.reference for volumes in by_channel.values() for v in volumes for s in v.slices}
    if len(frames) > 1 or "" in frames:
        return Refused("channels_disagree", "They do not share one frame of reference.")
    return None


def _same_grid(a: Image, b: Image) -> bool:
    same_shape = a.data.shape == b.data.shape
    return same_shape and corners_apart(a.data.shape, a.affine, b.affine) <= SAME_MM


def _moved(image: Image, first: Image) -> Image:
    if _covered(image, first) < MIN_OVERLAP:
        raise Refused("channels_disagree", "One covers too little of another.")
    values = image.data.astype(np.float32)
    moved = resample(values, image.affine, first.data.shape, first.affine, order=1)
    return Image(compact(moved), first.affine, first.orientation)


def _covered(image: Image, first: Image) -> float:
    """Share of the first's voxels, some thirty a side, within the other's field of view."""
    step: Affine = np.linalg.inv(image.affine) @ first.affine
    sides = [np.arange(0, n, max(1, n // 32)) for n in first.data.shape]
    indices = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1)
    places = indices @ step[:3, :3].T + step[:3, 3]
    inside = (places > -0.5) & (places < np.array(image.data.shape) - 0.5)
    return float(inside.all(-1).mean())
