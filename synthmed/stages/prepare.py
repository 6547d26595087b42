"""Catalogue to dataset: one grid, one intensity scale, and a split by patient.

Scaling looks at one scan alone and the grid is given by the config, so nothing here mixes
patients; without `spacing_mm` the cohort's median voxel size is used, which differential privacy
would have to pay for and therefore refuses.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt

from synthmed.artifacts import Catalogue, ChannelInfo, Scan
from synthmed.config import Channel, Config, Data
from synthmed.errors import InputError, ResourceError
from synthmed.formats.grid import resample
from synthmed.keys import Key
from synthmed.progress import Progress
from synthmed.store import write_json
from synthmed.types import Affine
from synthmed.view import Frame, Size, measured, view_of

# brighter than the high percentile by more than a quarter is clipped: vessels, fat, artefacts
CLIP = 1.25


def prepare(
    config: Config, catalogue: Catalogue, target: Path, progress: Progress
) -> dict[str, Any]:
    """Fill `target` with `volumes.npy` (n_scans, C, X, Y, Z) float16 and `dataset.json`.

    Returns:
        Facts: counts of patients and scans on either side, grid and spacing.

    Raises:
        UsageError: the spacing has to be given (under differential privacy).
        InputError: one side of the split would be empty, or a patient would be on both.
        ResourceError: not enough disk for the dataset.
    """
    data = config.data
    scans = sorted(catalogue.scans, key=lambda s: s.scan)
    channels = channels_of(data)
    spacing = _spacing(config, scans)
    affine = grid_affine(data.grid, spacing)
    if config.privacy is None:
        holdout = split_stratified(scans, data.holdout, Key.root(config.seed).fold("split"))
    else:
        holdout = split_by_hash(scans, data.holdout, Key.root(config.seed).fold("split"))
    n_holdout = len({s.patient for s in scans if s.patient in holdout})
    n_train = len({s.patient for s in scans}) - n_holdout
    if n_train == 0:
        raise InputError(
            "data.holdout: no patient is left to train on", "Lower data.holdout, or add patients."
        )
    shape = (len(scans), len(channels), *data.grid)
    need = 2 * math.prod(shape)
    if shutil.disk_usage(target).free < 1.1 * need:
        raise ResourceError(
            f"{target}: the prepared cohort needs {need / 2**30:.1f} GiB, which the disk lacks",
            "Free some space, choose another place with --run, or lower data.grid.",
        )
    views: list[Size] = []
    # written, not mapped: a disk that fills up is then an error, where a map would be a bus error
    with open(target / "volumes.npy", "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for i, scan in enumerate(scans):
            volume, view = conform(catalogue, scan, data, channels, affine)
            file.write(volume.astype("<f2").tobytes())
            views.append(view)
            progress.update(i + 1, len(scans))
    write_json(
        target / "dataset.json",
        {
            "affine": affine.tolist(),
            "channels": [asdict(c) for c in channels],
            "scans": [
                {
                    "scan": s.scan,
                    "patient": s.patient,
                    "split": "holdout" if s.patient in holdout else "train",
                    "labels": dict(s.labels),
                    "view": list(v),
                }
                for s, v in zip(scans, views, strict=True)
            ],
        },
    )
    return {
        "n_scans": len(scans),
        "n_train": n_train,
        "n_holdout": n_holdout,
        "n_patients": n_train + n_holdout,
        "grid": list(data.grid),
        "spacing_mm": [round(s, 4) for s in spacing],
        "channels": [c.name for c in channels],
        "split": "stratified by label" if config.privacy is None else "by keyed hash alone",
    }


def channels_of(data: Data) -> list[ChannelInfo]:
    """Images first, then one channel a mask label, those of given masks last."""
    declared: Mapping[str, Channel | None] = data.channels or {data.modality: None}
    images = [ChannelInfo(k) for k, c in declared.items() if c is None or c.labels is None]
    masks = [
        ChannelInfo(f"{k}:{label}", mask=k, label_value=value, given=c.given)
        for k, c in declared.items()
        if c is not None and c.labels is not None
        for label, value in c.labels.items()
    ]
    return images + sorted(masks, key=lambda c: c.given)


def grid_affine(grid: Sequence[int], spacing_mm: Sequence[float]) -> Affine:
    """RAS+ affine of a grid centred on the origin."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(np.array(grid) - 1) / 2 * np.array(spacing_mm)
    return affine


class Conformed(NamedTuple):
    """One scan on the grid.

    Args:
        volume: (C, X, Y, Z), images scaled by their own percentiles, masks 0 to 1.
        view: voxels of the grid that it covers along X, Y and Z.
    """

    volume: npt.NDArray[np.float32]
    view: Size


def conform(
    catalogue: Catalogue,
    scan: Scan,
    data: Data,
    channels: Sequence[ChannelInfo],
    affine: Affine,
) -> Conformed:
    """One scan on the grid, its field of view in the middle, 0 outside.

    The edge of a mask that is drawn is soft where the grids differ; a given one takes the nearest
    voxel, since that is how masks will be given at sampling (`conform_labels`). Under `data.view:
    drawn` an empty frame within the file is no part of its field of view; masks that are given
    are left where they are.
    """
    files = dict.fromkeys(c.mask or c.name for c in channels)
    images = {
        name: nib.nifti1.Nifti1Image.from_filename(catalogue.file(scan, name)) for name in files
    }
    if data.view == "grid" or any(c.given for c in channels):
        frame = None
    else:
        frame = measured(np.asarray(images[channels[0].name].dataobj))
    parts = {name: _part(image, frame, data.grid, affine) for name, image in images.items()}
    out = np.zeros((len(channels), *data.grid), np.float32)
    for i, channel in enumerate(channels):
        values, place = parts[channel.mask or channel.name]
        if channel.mask is None:
            low, high = np.percentile(
                values, [data.intensity.low_percentile, data.intensity.high_percentile]
            )
            values = (values - low) / max(float(high - low), 1e-9)
            order = 3
        elif channel.given:
            labels = conform_labels(values, place, data.grid, affine)
            out[i] = labels == channel.label_value
            continue
        else:
            values = (values == channel.label_value).astype(np.float32)
            order = 1
        moved = _resample(values, _centred(values, place), data.grid, affine, order)
        out[i] = np.clip(moved, 0, CLIP if channel.mask is None else 1)
    views = {view_of(v.shape, place, data.grid, affine) for v, place in parts.values()}
    return Conformed(out, views.pop() if frame is not None and len(views) == 1 else data.grid)


def _part(
    image: nib.nifti1.Nifti1Image, frame: Frame | None, grid: Size, target: Affine
) -> tuple[npt.NDArray[np.float32], Affine]:
    """The values of an image within a frame, and the affine of what is left."""
    values, affine = np.asarray(image.dataobj, np.float32), np.array(image.affine, float)
    affine = _in_plane(affine, grid, target)
    if frame is None:
        return values, affine
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in frame]
    return values[frame], affine


def conform_labels(
    values: npt.NDArray[Any], source: Affine, grid: tuple[int, int, int], target: Affine
) -> npt.NDArray[np.uint8]:
    """A label map on the grid by nearest neighbour: (X, Y, Z), 0 outside its field of view.

    Args:
        values: (I, J, K) labels, RAS+.
        source: (4, 4) of `values`; its field of view is centred on the grid's.
        grid: (X, Y, Z).
        target: (4, 4) of the grid.
    """
    place = _centred(values, _in_plane(source, grid, target))
    return _resample(values.astype(np.float32), place, grid, target, order=0).astype(np.uint8)


def _in_plane(source: Affine, grid: Size, target: Affine) -> Affine:
    """The affine of a scan; of a single slice as if it lay in the plane of the grid.

    How a slice is tilted and how thick it is says nothing about where its voxels lie in it.
    """
    if 1 not in grid:
        return source
    flat = grid.index(1)
    affine = np.diag([*np.linalg.norm(source[:3, :3], axis=0), 1.0])
    affine[flat, flat] = target[flat, flat]
    affine[:3, 3] = source[:3, 3]
    return affine


def _centred(values: npt.NDArray[Any], source: Affine) -> Affine:
    """The affine of a volume, moved so that the middle of its field of view is the origin."""
    affine = np.array(source, float)
    middle = affine[:3, :3] @ ((np.array(values.shape[:3]) - 1) / 2)
    affine[:3, 3] = -middle
    return affine


def _resample(
    values: npt.NDArray[np.float32],
    source: Affine,
    grid: tuple[int, int, int],
    target: Affine,
    order: int,
) -> npt.NDArray[np.float32]:
    """Values at the grid's voxels: copied where its voxels are the scan's, else interpolated.

    Copied are also scans that lie half a voxel aside, as one of odd length on an even grid does:
    the place of a scan says nothing once it is centred, and interpolating would blur those alone.
    """
    offset = np.linalg.solve(source, target @ [0, 0, 0, 1])[:3]
    if np.allclose(source[:3, :3], target[:3, :3], atol=1e-4):
        return _crop_or_pad(values, np.round(offset).astype(int), grid)
    return resample(values, source, grid, target, order)


def _crop_or_pad(
    values: npt.NDArray[np.float32], offset: npt.NDArray[np.int_], grid: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """The block of `values` that starts at `offset`, zero outside the scan."""
    out = np.zeros(grid, np.float32)
    start = np.maximum(offset, 0)
    stop = np.minimum(offset + grid, values.shape)
    if (stop > start).all():
        inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        place = tuple(slice(a, b) for a, b in zip(start - offset, stop - offset, strict=True))
        out[place] = values[inside]
    return out


def _spacing(config: Config, scans: Sequence[Scan]) -> tuple[float, float, float]:
    if config.data.spacing_mm is not None:
        return config.data.spacing_mm
    x, y, z = np.median([s.spacing_mm for s in scans], axis=0)
    return float(x), float(y), float(z)


def split_by_hash(scans: Sequence[Scan], share: float, key: Key) -> set[str]:
    """Held-out patients, each decided by a keyed hash of its pseudonym alone.

    Guarantee: adding or removing one patient moves no other (what differential privacy needs).
    """
    given = _prescribed(scans)
    if given is not None:
        return given
    return {s.patient for s in scans if key.fold(s.patient).integer() < share * 2**63}


def split_stratified(scans: Sequence[Scan], share: float, key: Key) -> set[str]:
    """Held-out patients, the same share of every stratum of categorical labels.

    Strata are the combinations of categorical labels of a patient's first scan, in which a label
    that is missing counts as one more category; the rounding of small strata is settled by
    largest remainder, so that the total is exact.
    """
    given = _prescribed(scans)
    if given is not None:
        return given
    strata: dict[tuple[tuple[str, str], ...], list[str]] = {}
    seen: set[str] = set()
    for s in sorted(scans, key=lambda s: (s.patient, s.session, s.scan)):
        if s.patient not in seen:
            seen.add(s.patient)
            label = tuple((k, v) for k, v in sorted(s.labels.items()) if isinstance(v, str))
            strata.setdefault(label, []).append(s.patient)
    total = round(share * len(seen))
    quota = {label: share * len(people) for label, people in strata.items()}
    take = {label: math.floor(q) for label, q in quota.items()}
    by_remainder = sorted(strata, key=lambda k: (take[k] - quota[k], k))
    for label in by_remainder[: max(total - sum(take.values()), 0)]:
        take[label] += 1
    return {
        p
        for label, people in strata.items()
        for p in sorted(people, key=lambda p: key.fold(p).digest)[: take[label]]
    }


def _prescribed(scans: Sequence[Scan]) -> set[str] | None:
    """Held-out patients where the table has a split column, else None.

    Raises:
        InputError: a patient's scans are on both sides.
    """
    sides: dict[str, set[str]] = {}
    for s in scans:
        if s.split is not None:
            sides.setdefault(s.patient, set()).add(s.split)
    if both := sorted(p for p, side in sides.items() if len(side) > 1):
        raise InputError(
            f"column split: patient {both[0]} is in train and in holdout"
            + (f" (and {len(both) - 1} more)" if len(both) > 1 else ""),
            "Put all scans of a person on one side.",
        )
    return {p for p, side in sides.items() if side == {"holdout"}} if sides else None


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    grid = "x".join(str(n) for n in facts["grid"])
    return (
        f"{facts['n_scans']} scans on {grid}, "
        f"{facts['n_train']} patients to train on, {facts['n_holdout']} held out"
    )
