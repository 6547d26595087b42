"""A screened cohort as a BIDS derivative dataset.

One subject a sample, sub-syn0001 on, in the order of the samples. Volumes are copied byte for
byte: the sampler wrote them with fresh headers. Every name and key written here is our own, so
that `deid.scan` can hold a release against this file. An image that has no suffix in BIDS'
anat folder (cardiac cine) lies in a folder of its own name, which .bidsignore lists.

Follows the BIDS specification 1.10: common principles, anat, derivatives/imaging.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthmed import __version__, ages
from synthmed.artifacts import Sample, ScreenedCohort
from synthmed.config import Condition

BIDS_VERSION = "1.10.0"

ANAT = re.compile(
    r"(T1|T2|PD)w|T1rho|(T1|T2|T2star|R1|R2|R2star|S0|M0|PD|Chi|MTR|MTV)map|T2starw|T2star"
    r"|FLAIR|PD|PDT2|inplaneT[12]|angio|UNIT1|MTsat"
)
"""Suffixes of BIDS' anat folder that one 3D volume can carry."""

DATATYPES = re.compile(r"anat|func|dwi|fmap|perf|i?eeg|meg|beh|pet|micr|nirs|motion|mrs")
"""Folders that BIDS gives a meaning."""

EXTRA = ("MODEL_CARD.md", "DATASHEET.md", "croissant.json", "SHA256SUMS", "report")
"""What a release holds beside BIDS; listed in .bidsignore, where a folder must have no slash."""

SIDECAR_KEYS = frozenset(("Description", "Synthetic", "SampleIndex", "SkullStripped", "Manual"))
DATASET_KEYS = frozenset(
    ("Name", "BIDSVersion", "DatasetType", "License", "GeneratedBy", "Version", "Description")
)


@dataclass(frozen=True)
class Naming:
    """How files of a cohort are called.

    Args:
        modality: `data.modality`: the suffix of the image when there is only one.
        masks: mask name to its labels (name to value); every other file of a sample is an image.
        skull_stripped: whether non-brain voxels are zero; BIDS requires the statement.
        given: masks that the model was given: they ship with the image, and are not its work.
    """

    modality: str
    masks: Mapping[str, Mapping[str, int]]
    skull_stripped: bool = False
    given: Collection[str] = ()


def subject(position: int) -> str:
    """The id of the sample at `position` (0, 1, ...) of the release."""
    return f"sub-syn{position + 1:04d}"


def export(
    cohort: ScreenedCohort,
    out: Path,
    *,
    title: str,
    license: str,
    conditions: Mapping[str, Condition],
    naming: Naming,
    readme: str,
) -> None:
    """Write `cohort` into the empty folder `out`; only a screened cohort is accepted.

    Args:
        cohort: what ships.
        out: an existing folder.
        title: of the dataset.
        license: of the dataset, as the config states it.
        conditions: what the labels mean, for participants.json.
        naming: the suffix of the image, and which files are masks.
        readme: the text of README.md.

    Raises:
        TypeError: `cohort` was not screened.
        ValueError: a sample names a file outside its folder.
    """
    if not isinstance(cohort, ScreenedCohort):
        raise TypeError(
            f"export: {type(cohort).__name__} was not screened, expected ScreenedCohort"
        )
    generator = {
        "Name": "synthmed",
        "Version": __version__,
        "Description": "All images are synthetic: drawn from a generative model, none was acquired",
    }
    dataset = {
        "Name": title,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "License": license,
        "GeneratedBy": [generator],
    }
    _write_json(out / "dataset_description.json", dataset)
    (out / "README.md").write_text(readme, encoding="utf-8")
    table = participants(cohort.samples, conditions)
    (out / "participants.tsv").write_text(table, encoding="utf-8")
    _write_json(out / "participants.json", _columns(conditions))
    ignored: set[str] = set()
    for position, (sample, folder) in enumerate(zip(cohort.samples, cohort.folders, strict=True)):
        sub = subject(position)
        for name, file in sample.files.items():
            if Path(file).name != file:
                raise ValueError(f"sample {sample.index}: file {file!r} is not a plain name")
            datatype, stem = _place(name, sample, naming)
            if datatype != "anat":
                ignored.add(f"sub-*/{datatype}")
            target = out / sub / datatype
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target / f"{sub}_{stem}.nii.gz")
            _write_json(target / f"{sub}_{stem}.json", _sidecar(sample, name, naming))
            if name in naming.masks:
                table = label_table(naming.masks[name])
                (target / f"{sub}_{stem}.tsv").write_text(table, encoding="utf-8")
    lines = [*EXTRA, *sorted(ignored)]
    (out / ".bidsignore").write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")


def participants(samples: Sequence[Sample], conditions: Mapping[str, Condition]) -> str:
    """participants.tsv: the id and the requested conditions of each sample, old ages pooled."""
    rows = [["participant_id", *conditions]]
    for position, sample in enumerate(samples):
        labels = ages.pooled(sample.labels, conditions)
        rows.append([subject(position), *(_cell(labels.get(name)) for name in conditions)])
    return _tsv(rows)


def label_table(labels: Mapping[str, int]) -> str:
    """The look-up table of a segmentation: index and name of each label, background included."""
    pairs = sorted((value, name) for name, value in labels.items())
    rows = [["index", "name"], ["0", "background"], *([str(v), n] for v, n in pairs)]
    return _tsv(rows)


def _place(name: str, sample: Sample, naming: Naming) -> tuple[str, str]:
    """Folder and the end of the file name (entities and suffix) of one file of a sample."""
    images = [n for n in sample.files if n not in naming.masks]
    if name in naming.masks:
        folder = _place(images[0], sample, naming)[0]
        # an entity's label is alphanumeric: left_ventricle becomes leftVentricle
        head, *rest = name.split("_")
        return folder, f"seg-{head}{''.join(r.capitalize() for r in rest)}_dseg"
    suffix = naming.modality if len(images) == 1 else name.replace("_", "")
    if ANAT.fullmatch(suffix):
        return "anat", suffix
    folder = suffix.lower()
    return (f"{folder}image" if DATATYPES.fullmatch(folder) else folder), suffix


def _sidecar(sample: Sample, name: str, naming: Naming) -> dict[str, Any]:
    """The metadata of one file: fixed sentences and the sample's place in the run's stream."""
    if name in naming.given:
        # whether it is synthetic is not known here: it came from outside
        about = "Segmentation that the synthetic image was drawn for; given, not generated"
        return {"Description": about, "SampleIndex": sample.index}
    is_mask = name in naming.masks
    what = "segmentation" if is_mask else "image"
    return {
        "Description": f"Synthetic {what} from a generative model; not a scan of a person",
        "Synthetic": True,
        "SampleIndex": sample.index,
        **({"Manual": False} if is_mask else {"SkullStripped": naming.skull_stripped}),
    }


def _columns(conditions: Mapping[str, Condition]) -> dict[str, Any]:
    """participants.json: what each column says."""
    columns: dict[str, Any] = {
        "participant_id": {"Description": "Synthetic subject; corresponds to no person"}
    }
    for name, condition in conditions.items():
        asked = "Condition that the model was asked for"
        if condition.kind == "categorical":
            levels = {c: c for c in condition.categories}
            columns[name] = {"Description": asked, "Levels": levels}
        else:
            unit = condition.unit if condition.unit != "1" else "arbitrary"
            limit = ages.pool(name, condition)
            pooled = "" if limit is None else f"; {limit:g} and over is written {limit:g}"
            text = asked + pooled
            columns[name] = {"Description": text, "Units": unit}
    return columns


def _cell(value: str | float | None) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return f"{value:.6g}"


def _tsv(rows: Sequence[Sequence[str]]) -> str:
    """Tab-separated text; a tab or line break inside a cell is quoted by the csv writer."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
