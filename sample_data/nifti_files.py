"""The cohort as BIDS folders of NIfTI files, with identities planted where hospitals leave them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from anatomy import LABELS
from cohort import COLUMNS, Patient, Scan, array_hash, render
from numpy.typing import NDArray

BROKEN_KINDS = ("truncated", "nan_affine", "text", "bad_header", "four_d")
"""Ways in which the files of the extra patients are broken, in the order of their use."""

_DESCRIPTIONS = {
    "participant_id": {"Description": "Participant label"},
    "diagnosis": {"Description": "Group", "Levels": {"control": "", "atrophy": ""}},
    "age": {"Description": "Age at the first scan", "Units": "year"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "ventricles_mm3": {"Description": "Lateral and third ventricles", "Units": "mm3"},
    "hippocampus_left_mm3": {"Description": "Left hippocampus", "Units": "mm3"},
    "hippocampus_right_mm3": {"Description": "Right hippocampus", "Units": "mm3"},
}


def dump_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON, ending in a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def nifti_bytes(
    patient: Patient,
    array: NDArray[np.integer],
    affine: NDArray[np.float64],
    session: int,
) -> bytes:
    """Uncompressed NIfTI-1 file of ``array`` with the identity in every text field."""
    who = patient.identity
    image = nib.Nifti1Image(array, affine)
    header = image.header
    header.set_xyzt_units("mm", "sec")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    header["descrip"] = f"{who.name} {who.birth_date} {who.physician}".encode()[:79]
    header["aux_file"] = who.patient_id.encode()[:23]
    header["db_name"] = who.accession.encode()[:17]
    header["intent_name"] = who.surname.encode()[:15]
    note = {
        "patient": who.name,
        "born": who.birth_date.isoformat(),
        "address": who.home_address,
        "scanned": who.study_dates[session - 1].isoformat(),
        "remark": who.comment,
    }
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", json.dumps(note).encode()))
    return image.to_bytes()


def _compress(data: bytes, name: str) -> bytes:
    """Gzip with the original file ``name`` in the header, and no time of day."""
    buffer = io.BytesIO()
    with gzip.GzipFile(name, "wb", compresslevel=1, fileobj=buffer, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


def _sidecar(patient: Patient, session: int) -> dict[str, object]:
    who = patient.identity
    date = who.study_dates[session - 1].isoformat()
    return {
        "Modality": "MR",
        "MagneticFieldStrength": 3,
        "Manufacturer": "Invented Magnets",
        "RepetitionTime": 2.3,
        "EchoTime": 0.003,
        "InversionTime": 0.9,
        "FlipAngle": 9,
        "PatientName": who.name,
        "PatientID": who.patient_id,
        "PatientBirthDate": who.birth_date.isoformat(),
        "PatientAddress": who.home_address,
        "InstitutionName": who.institution,
        "InstitutionAddress": who.institution_address,
        "StationName": who.station,
        "AccessionNumber": who.accession,
        "ReferringPhysicianName": who.physician,
        "AcquisitionDateTime": f"{date}T09:41:27.250000",
        "ImageComments": who.comment,
    }


def _break(kind: str, patient: Patient, scan: Scan, name: str) -> bytes:
    """Content of a file that is broken in the way ``kind``."""
    if kind == "text":
        return f"{patient.identity.name}: scan kept on film, see archive\n".encode() * 40
    if kind == "four_d":
        scan = Scan(np.stack([scan.voxels] * 3, axis=-1), scan.labels, scan.affine)
    data = bytearray(nifti_bytes(patient, scan.voxels, scan.affine, 1))
    if kind == "nan_affine":
        # The sform rows lie at byte 280; a qform code of 0 leaves nothing to fall back on.
        data[252:254] = struct.pack("<h", 0)
        data[280:328] = struct.pack("<12f", *[float("nan")] * 12)
    elif kind == "bad_header":
        data[0:4] = struct.pack("<i", 1912)
        data[40:56] = struct.pack("<8h", *[-7] * 8)
        data[344:348] = b"what"
    packed = _compress(bytes(data), name)
    return packed[: len(packed) * 3 // 5] if kind == "truncated" else packed


def write_bids(
    folder: Path, patients: Sequence[Patient], extra: Sequence[Patient], grid: int
) -> tuple[dict[str, str], list[dict[str, str]], dict[str, str]]:
    """Write the data set into ``folder``; ``extra`` patients get one broken file each.

    Returns hashes by array name and table rows, both for ``cohort.digest``, and how each
    broken file is broken, by path inside ``folder``.
    """
    arrays: dict[str, str] = {}
    broken: dict[str, str] = {}
    labels_root = folder / "derivatives" / "labels"
    for patient in patients:
        sub = patient.participant_id
        for session in range(1, patient.sessions + 1):
            scan = render(patient, session, "bids", grid)
            stem = f"{sub}_ses-{session:02d}"
            for root, suffix, array in (
                (folder, "T1w", scan.voxels),
                (labels_root, "dseg", scan.labels),
            ):
                anat = root / sub / f"ses-{session:02d}" / "anat"
                anat.mkdir(parents=True)
                data = nifti_bytes(patient, array, scan.affine, session)
                path = anat / f"{stem}_{suffix}.nii.gz"
                path.write_bytes(_compress(data, f"{stem}_{suffix}.nii"))
                arrays[f"{stem}_{suffix}"] = array_hash(array)
            side = folder / sub / f"ses-{session:02d}" / "anat" / f"{stem}_T1w.json"
            dump_json(side, _sidecar(patient, session))
    for i, patient in enumerate(extra):
        kind = BROKEN_KINDS[i % len(BROKEN_KINDS)]
        stem = f"{patient.participant_id}_ses-01"
        anat = folder / patient.participant_id / "ses-01" / "anat"
        anat.mkdir(parents=True)
        path = anat / f"{stem}_T1w.nii.gz"
        scan = render(patient, 1, "bids", grid)
        path.write_bytes(_break(kind, patient, scan, f"{stem}_T1w.nii"))
        dump_json(anat / f"{stem}_T1w.json", _sidecar(patient, 1))
        broken[path.relative_to(folder).as_posix()] = kind
    rows = [patient.row() for patient in (*patients, *extra)]
    _write_tables(folder, labels_root, rows)
    return arrays, rows, broken


def _write_tables(folder: Path, labels_root: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with (folder / "participants.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["participant_id"]))
    dump_json(folder / "participants.json", _DESCRIPTIONS)
    about = {"Name": "synthmed head phantoms", "BIDSVersion": "1.9.0", "License": "Apache-2.0"}
    dump_json(folder / "dataset_description.json", about | {"DatasetType": "raw"})
    labels_root.mkdir(parents=True, exist_ok=True)
    dump_json(
        labels_root / "dataset_description.json",
        about | {"DatasetType": "derivative", "GeneratedBy": [{"Name": "phantoms.py"}]},
    )
    lines = ["index\tname"] + [f"{value}\t{name}" for value, name in LABELS.items()]
    (labels_root / "dseg.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / ".bidsignore").write_text("COMPLETE.json\n", encoding="utf-8")


def read_bids(
    folder: Path, broken: Mapping[str, str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Hashes by array name and table rows of a written data set, leaving ``broken`` out."""
    arrays = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        if path.relative_to(folder).as_posix() in broken:
            continue
        image = nib.load(path)
        arrays[path.name.removesuffix(".nii.gz")] = array_hash(np.asarray(image.dataobj))
    with (folder / "participants.tsv").open(encoding="utf-8", newline="") as stream:
        return arrays, list(csv.DictReader(stream, delimiter="\t"))
