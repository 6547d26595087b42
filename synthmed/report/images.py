"""Which volumes a report shows, and their pictures.

The shareable report gets `synthetic` alone. `real` and `closest` take the dataset of real scans,
so that nothing real can be drawn without handing it over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthmed.artifacts import Cohort, Dataset, Sample, ScreenedCohort
from synthmed.config import Condition
from synthmed.formats import nifti
from synthmed.formats.bids_export import AGE_POOL_YEARS, is_age, subject
from synthmed.report.mosaic import GAP_PIXELS, Grey, png, three_planes
from synthmed.types import Labels

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


def synthetic(
    cohort: ScreenedCohort, conditions: Mapping[str, Condition], masks: Collection[str]
) -> list[Picture]:
    """Up to `N_SYNTHETIC` samples, as many of each category of the first categorical condition."""
    name = next((n for n, c in conditions.items() if c.kind == "categorical"), None)
    parts: dict[str, list[int]] = {}
    for position, sample in enumerate(cohort.samples):
        value = sample.labels.get(name) if name else None
        parts.setdefault("" if value is None else f"{name}: {value}", []).append(position)
    pictures = []
    for part, positions in sorted(parts.items()):
        for position in positions[: max(1, N_SYNTHETIC // len(parts))]:
            sample = cohort.samples[position]
            planes = _drawn(sample, cohort.folders[position], masks)
            file = f"images/synthetic-{position + 1:04d}.png"
            caption = _caption(subject(position), sample.labels)
            pictures.append(Picture(file, "synthetic", part, caption, png(planes)))
    return pictures


def real(dataset: Dataset) -> list[Picture]:
    """The first scan of up to `N_REAL` training patients. Restricted report only."""
    pictures = []
    for i, patient in enumerate(dataset.train_patients()[:N_REAL]):
        at = _first_scan(dataset, patient)
        content = png(_real_planes(dataset, at))
        caption = _caption(patient, dataset.labels[at])
        pictures.append(Picture(f"images/train-{i + 1:04d}.png", "train", "", caption, content))
    return pictures


def closest(
    cohort: ScreenedCohort, sampled: Cohort | None, dataset: Dataset, masks: Collection[str]
) -> list[Picture]:
    """Up to `N_CLOSEST` samples above their nearest training scan, flagged ones first.

    Args:
        cohort: what the screen said of every sample.
        sampled: all samples, the dropped ones too; without it only those that ship are shown.
        dataset: the real scans.
        masks: names of the files of a sample that are masks.
    """
    places = {s.index: (s, f) for s, f in zip(cohort.samples, cohort.folders, strict=True)}
    if sampled is not None:
        # a replacement has an index past those sampled, so neither hides the other
        places.update({s.index: (s, sampled.path) for s in sampled.samples})
    ships = {s.index for s in cohort.samples}
    train = set(dataset.train_patients())
    known = [s for s in cohort.screened if s.index in places and s.nearest in train]
    ranked = sorted(known, key=lambda s: (not s.flagged, -(s.gap or 0.0), s.index))
    pictures = []
    for i, s in enumerate(ranked[:N_CLOSEST]):
        above = _drawn(*places[s.index], masks)
        below = _real_planes(dataset, _first_scan(dataset, str(s.nearest)))
        line = np.full((GAP_PIXELS, above.shape[1]), 255, dtype=np.uint8)
        caption = f"sample {s.index} ({'ships' if s.index in ships else 'dropped'}) and {s.nearest}"
        if s.similarity is not None:
            caption += f", similarity {s.similarity:.2f}"
        content = png(np.vstack([above, line, below]))
        pictures.append(Picture(f"images/nearest-{i + 1:04d}.png", "nearest", "", caption, content))
    return pictures


def _first_scan(dataset: Dataset, patient: str) -> int:
    return int(np.flatnonzero(dataset.patients == patient)[0])


def _real_planes(dataset: Dataset, at: int) -> Grey:
    channel = next(i for i, c in enumerate(dataset.channels) if c.mask is None)
    return three_planes(dataset.volumes[at, channel], dataset.affine)


def _drawn(sample: Sample, folder: Path, masks: Collection[str]) -> Grey:
    """The central slices of the first image of a sample."""
    file = next(f for n, f in sample.files.items() if n not in masks)
    image = nifti.read(folder / file)
    return three_planes(image.data, image.affine)


def _caption(who: str, labels: Labels) -> str:
    parts = [who]
    for name, value in labels.items():
        if isinstance(value, str):
            parts.append(f"{name} {value}")
        else:
            pooled = min(value, AGE_POOL_YEARS) if is_age(name) else value
            parts.append(f"{name} {pooled:.3g}")
    return ", ".join(parts)
