"""Readers of what the stages pass on. The real side and the synthetic side never share a type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.types import Frozen, Labels

COPIES, COPIES_REPLACED = "copies.json", "copies-replaced.json"
"""In a screening: the verdict on every sample, and on every replacement."""


class Scan(Frozen):
    """One ingested scan, pseudonyms only.

    Args:
        scan: pseudonym of the scan, unique in the catalogue; also the stem of its files.
        patient: pseudonym of the person; the unit of every split and statistic.
        session: 1, 2, ... in the order of the patient's sessions.
        channels: channel name to file name in the catalogue's folder volumes/ (RAS+ NIfTI).
        shape: voxels (X, Y, Z) in RAS+.
        spacing_mm: voxel size in RAS+.
        orientation: axis codes as acquired, such as "LAS".
        scanner: allow-listed technical fields (manufacturer, field strength).
        labels: condition name to value.
        split: "train" or "holdout" where the table prescribes it, else null.
        volume: what tells it from other volumes of its series, such as "echo-2"; else empty.
        text_masked: whether text that was drawn into it was painted over.
        brain_ml: volume of the brain where all outside was removed, and `removed_share` of voxels.
        sequence: milliseconds of repetition, echo and inversion where the header says them.
    """

    scan: str
    patient: str
    session: int
    channels: Mapping[str, str]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    scanner: Mapping[str, str | float] = {}
    labels: Mapping[str, str | float] = {}
    split: str | None = None
    volume: str = ""
    sequence: Mapping[str, float] = {}
    text_masked: bool = False
    brain_ml: float | None = None
    removed_share: float | None = None


@dataclass(frozen=True)
class Catalogue:
    """What ingest found fit for use, in RUN/private/ingest."""

    path: Path
    scans: Sequence[Scan]

    @classmethod
    def open(cls, path: Path) -> Catalogue:
        """Read catalogue.jsonl in `path`."""
        lines = (path / "catalogue.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(path, tuple(Scan.model_validate_json(line) for line in lines))

    def file(self, scan: Scan, channel: str) -> Path:
        """The NIfTI file of one channel of a scan."""
        return self.path / "volumes" / scan.channels[channel]


@dataclass(frozen=True)
class ChannelInfo:
    """One channel of the prepared grid: an image, or one label of a mask (0 to 1).

    A given channel is told to the model, not drawn by it; given channels come last.
    """

    name: str
    mask: str | None = None
    label_value: int | None = None
    given: bool = False


@dataclass(frozen=True)
class Dataset:
    """Conformed real scans on one grid, in RUN/private/prepare.

    Args:
        volumes: (n_scans, C, X, Y, Z) float16 memory map; images about 0 to 1, masks 0 to 1.
        patients: (n_scans,) pseudonym of each scan's person.
        labels: per scan, condition name to value.
        holdout: (n_scans,) True where the scan's patient is held out.
        channels: what each of the C channels is.
        affine: (4, 4) of the grid.
        views: (n_scans, 3) how much of the grid each scan covers (view.py); None, all of it.
    """

    volumes: npt.NDArray[np.float16]
    patients: npt.NDArray[np.str_]
    labels: Sequence[Labels]
    holdout: npt.NDArray[np.bool_]
    channels: Sequence[ChannelInfo]
    affine: npt.NDArray[np.float64]
    views: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Map the dataset in `path` without reading the voxels."""
        index = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
        volumes = np.load(path / "volumes.npy", mmap_mode="r", allow_pickle=False)
        return cls(
            volumes=volumes,
            patients=np.array([s["patient"] for s in index["scans"]]),
            labels=[s["labels"] for s in index["scans"]],
            holdout=np.array([s["split"] == "holdout" for s in index["scans"]], dtype=bool),
            channels=[ChannelInfo(**c) for c in index["channels"]],
            affine=np.array(index["affine"]),
            views=np.array([s["view"] for s in index["scans"]], np.int64),
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Voxels (X, Y, Z)."""
        x, y, z = self.volumes.shape[2:]
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the grid."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def train_patients(self) -> list[str]:
        """Pseudonyms of the training patients, sorted."""
        return sorted(set(self.patients[~self.holdout]))

    def holdout_patients(self) -> list[str]:
        """Pseudonyms of the held-out patients, sorted."""
        return sorted(set(self.patients[self.holdout]))


class Sample(Frozen):
    """One synthetic scan on disk.

    Args:
        index: k, its place in the run's stream of samples.
        labels: the conditions it was asked for.
        files: image channel or mask name to file name, beside the table that lists it.
    """

    index: int
    labels: Mapping[str, str | float]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Cohort:
    """Synthetic scans as sampled, in RUN/private/sample. Cannot be exported."""

    path: Path
    samples: Sequence[Sample]

    @classmethod
    def open(cls, path: Path) -> Cohort:
        """Read samples.jsonl in `path`."""
        return cls(path, read_samples(path / "samples.jsonl"))


class Screened(Frozen):
    """What the screen says of one sample; `nearest` is the pseudonym of the likeliest source."""

    index: int
    flagged: bool
    gap: float
    p: float
    nearest: str
    similarity: float


@dataclass(frozen=True)
class ScreenedCohort:
    """What may be exported once the policy passes: kept samples and replacements.

    Args:
        samples: the synthetic scans that ship, in the order of their index.
        folders: where the files of each sample lie (the cohort's folder, or the screening's).
        screened: the outcome for every sample as sampled, replacements not included.
        under_two_names: pairs of pseudonyms that stand out as one person; null where that was not
            asked, of few people or by an earlier version.
        replaced: the outcome for every replacement; null where an earlier version did not screen
            them.
    """

    samples: Sequence[Sample]
    folders: Sequence[Path]
    screened: Sequence[Screened]
    under_two_names: Sequence[Sequence[str]] | None = None
    replaced: Sequence[Screened] | None = ()

    @classmethod
    def open(cls, cohort: Cohort, path: Path) -> ScreenedCohort:
        """Join the screening in `path` with the cohort it screened."""
        copies = json.loads((path / COPIES).read_text(encoding="utf-8"))
        screened = _outcomes(cohort.samples, copies)
        new = read_samples(path / "replacements.jsonl")
        again = path / COPIES_REPLACED
        replaced: Sequence[Screened] | None = () if not new else None
        if again.exists():
            replaced = _outcomes(new, json.loads(again.read_text(encoding="utf-8")))
        dropped = set(json.loads((path / "dropped.json").read_text(encoding="utf-8")))
        kept = [(s, cohort.path) for s in cohort.samples if s.index not in dropped]
        both = sorted(kept + [(s, path) for s in new], key=lambda pair: pair[0].index)
        pairs = copies.get("under_two_names")
        return cls([s for s, _ in both], [f for _, f in both], screened, pairs, replaced)


def _outcomes(samples: Sequence[Sample], copies: Mapping[str, Any]) -> list[Screened]:
    return [
        Screened(
            index=sample.index,
            flagged=m["copy_of"] is not None,
            gap=m["gap"],
            p=m["p"],
            nearest=m["nearest_patient"],
            similarity=m["in_train"],
        )
        for sample, m in zip(samples, copies["matches"], strict=True)
    ]


def read_samples(path: Path) -> list[Sample]:
    """The samples listed in a samples.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Sample.model_validate_json(line) for line in lines]
