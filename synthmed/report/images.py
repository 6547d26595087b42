"""Which volumes a report shows, and their pictures.

The shareable report gets `synthetic` alone. `real` and `closest` take the dataset of real scans,
so that nothing real can be drawn without handing it over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthmed import ages
from synthmed.artifacts import Cohort, Dataset, Sample, Screened, ScreenedCohort
from synthmed.config import Condition, Config
from synthmed.formats import nifti
from synthmed.formats import synthetic as synthetic_files
from synthmed.formats.bids_export import subject
from synthmed.report import mosaic
from synthmed.report.mosaic import GAP_PIXELS, PALETTE, png, three_planes
from synthmed.report.viewer import MAX_VOLUMES, small_copy
from synthmed.types import Affine, Labels

Masks = Mapping[str, Mapping[str, int]]
"""Mask name to its labels, name to value."""

N_SYNTHETIC = 24
N_REAL = 12
N_CLOSEST = 8


@dataclass(frozen=True)
class Picture:
    """One image of a report: its entry in report.json and its bytes."""

    file: str
    group: str
    part: str
    caption: str
    content: bytes

    def entry(self) -> dict[str, str]:
        """What report.json says of it."""
        return {"file": self.file, "group": self.group, "part": self.part, "caption": self.caption}


def masks_of(config: Config) -> Masks:
    """The masks of a config, drawn and given."""
    return {n: c.labels for n, c in (config.data.channels or {}).items() if c.labels}


def legend(masks: Masks) -> list[dict[str, str]]:
    """Mask, label and colour (#RRGGBB) of every outline that pictures show."""
    every = [(mask, label) for mask, labels in masks.items() for label in labels]
    return [
        {"mask": mask, "label": label, "colour": PALETTE[i % len(PALETTE)]}
        for i, (mask, label) in enumerate(every)
    ]


def synthetic(
    cohort: ScreenedCohort, conditions: Mapping[str, Condition], masks: Masks
) -> list[Picture]:
    """Up to `N_SYNTHETIC` samples, as many of each category of the first categorical condition."""
    parts = _parts(cohort, conditions)
    pictures = []
    for part, positions in sorted(parts.items()):
        for position in positions[: max(1, N_SYNTHETIC // len(parts))]:
            sample = cohort.samples[position]
            planes = _drawn(sample, cohort.folders[position], masks)
            file = f"images/synthetic-{position + 1:04d}.png"
            caption = _caption(subject(position), ages.pooled(sample.labels, conditions))
            pictures.append(Picture(file, "synthetic", part, caption, png(planes)))
    return pictures


def real(dataset: Dataset, masks: Masks) -> list[Picture]:
    """The first scan of up to `N_REAL` training patients. Restricted report only."""
    pictures = []
    for i, patient in enumerate(dataset.train_patients()[:N_REAL]):
        at = _first_scan(dataset, patient)
        content = png(_real_planes(dataset, at, masks))
        caption = _caption(patient, dataset.labels[at])
        pictures.append(Picture(f"images/train-{i + 1:04d}.png", "train", "", caption, content))
    return pictures


def closest(
    cohort: ScreenedCohort, sampled: Cohort | None, dataset: Dataset, masks: Masks
) -> list[Picture]:
    """Up to `N_CLOSEST` samples above their nearest training scan, flagged ones first.

    Args:
        cohort: what the screen said of every sample.
        sampled: all samples, the dropped ones too; without it only those that ship are shown.
        dataset: the real scans.
        masks: the files of a sample that are masks, and their labels.
    """
    ships = {s.index for s in cohort.samples}
    pictures = []
    for i, (s, place) in enumerate(_ranked(cohort, sampled, dataset)[:N_CLOSEST]):
        above = _drawn(*place, masks)
        below = _real_planes(dataset, _first_scan(dataset, str(s.nearest)), masks)
        line = np.full((GAP_PIXELS, *above.shape[1:]), 255, dtype=np.uint8)
        caption = f"sample {s.index} ({'ships' if s.index in ships else 'dropped'}) and {s.nearest}"
        if s.similarity is not None:
            caption += f", similarity {s.similarity:.2f}"
        content = png(np.vstack([above, line, below]))
        pictures.append(Picture(f"images/nearest-{i + 1:04d}.png", "nearest", "", caption, content))
    return pictures


def viewed(
    cohort: ScreenedCohort, conditions: Mapping[str, Condition], masks: Masks
) -> list[Picture]:
    """Volumes of up to `MAX_VOLUMES` samples, one of each part in turn."""
    parts = [positions for _, positions in sorted(_parts(cohort, conditions).items())]
    turns = [p for turn in zip_longest(*parts) for p in turn if p is not None]
    out = []
    for position in turns[:MAX_VOLUMES]:
        sample = cohort.samples[position]
        content = _sampled_volume(sample, cohort.folders[position], masks)
        file = f"viewer/synthetic-{position + 1:04d}.nii.gz"
        caption = _caption(subject(position), ages.pooled(sample.labels, conditions))
        out.append(Picture(file, "synthetic", "", caption, content))
    return out


def viewed_closest(
    cohort: ScreenedCohort, sampled: Cohort | None, dataset: Dataset, masks: Masks
) -> list[Picture]:
    """Volumes of the closest samples, each before its nearest training scan. Restricted only."""
    out = []
    for i, (s, place) in enumerate(_ranked(cohort, sampled, dataset)[: MAX_VOLUMES // 2]):
        at = _first_scan(dataset, str(s.nearest))
        channel = next(i for i, c in enumerate(dataset.channels) if c.mask is None)
        real_copy = small_copy(dataset.volumes[at][channel], dataset.affine)
        for name, caption, content in (
            ("sample", f"sample {s.index}", _sampled_volume(*place, masks)),
            ("train", f"its nearest, {s.nearest}", real_copy),
        ):
            file = f"viewer/nearest-{i + 1:04d}-{name}.nii.gz"
            out.append(Picture(file, "nearest", "", caption, content))
    return out


def _parts(cohort: ScreenedCohort, conditions: Mapping[str, Condition]) -> dict[str, list[int]]:
    """Samples by the first categorical condition."""
    name = next((n for n, c in conditions.items() if c.kind == "categorical"), None)
    parts: dict[str, list[int]] = {}
    for position, sample in enumerate(cohort.samples):
        value = sample.labels.get(name) if name else None
        parts.setdefault("" if value is None else f"{name}: {value}", []).append(position)
    return parts


def _ranked(
    cohort: ScreenedCohort, sampled: Cohort | None, dataset: Dataset
) -> list[tuple[Screened, tuple[Sample, Path]]]:
    """Samples and where they lie, flagged ones first, then by how close they are to a patient."""
    places = {s.index: (s, f) for s, f in zip(cohort.samples, cohort.folders, strict=True)}
    if sampled is not None:
        # a replacement has an index past those sampled, so neither hides the other
        places.update({s.index: (s, sampled.path) for s in sampled.samples})
    train = set(dataset.train_patients())
    known = [s for s in cohort.screened if s.index in places and s.nearest in train]
    ranked = sorted(known, key=lambda s: (not s.flagged, -(s.gap or 0.0), s.index))
    return [(s, places[s.index]) for s in ranked]


def _sampled_volume(sample: Sample, folder: Path, masks: Masks) -> bytes:
    image = nifti.read(folder / next(f for n, f in sample.files.items() if n not in masks))
    return small_copy(image.data, image.affine)


def _first_scan(dataset: Dataset, patient: str) -> int:
    return int(np.flatnonzero(dataset.patients == patient)[0])


def _real_planes(dataset: Dataset, at: int, masks: Masks) -> mosaic.Picture:
    channel = next(i for i, c in enumerate(dataset.channels) if c.mask is None)
    volume = dataset.volumes[at].astype(np.float32)
    files = synthetic_files.encode(volume, dataset.channels) if masks else {}
    return _outlined(volume[channel], dataset.affine, [files[m] for m in masks], masks)


def _drawn(sample: Sample, folder: Path, masks: Masks) -> mosaic.Picture:
    """The slices of the first image of a sample, its masks outlined."""
    file = next(f for n, f in sample.files.items() if n not in masks)
    image = nifti.read(folder / file)
    maps = [nifti.read(folder / sample.files[m]).data for m in masks]
    return _outlined(image.data, image.affine, maps, masks)


def _outlined(
    image: npt.NDArray[np.generic],
    affine: Affine,
    maps: Sequence[npt.NDArray[np.generic]],
    masks: Masks,
) -> mosaic.Picture:
    """Slices of an image; where there are masks, cut where they are largest, in the legend's
    colours."""
    if not masks:
        return three_planes(image, affine)
    counted = []
    first = 1
    for found, labels in zip(maps, masks.values(), strict=True):
        order = np.zeros(found.shape, np.int64)
        for i, value in enumerate(labels.values()):
            order[found == value] = first + i
        counted.append(order)
        first += len(labels)
    at = mosaic.largest(counted)
    return mosaic.outlined(three_planes(image, affine, at), counted, affine, at)


def _caption(who: str, labels: Labels) -> str:
    parts = [who]
    for name, value in labels.items():
        if isinstance(value, str):
            parts.append(f"{name} {value}")
        else:
            parts.append(f"{name} {value:.3g}")
    return ", ".join(parts)
