"""The cohort as DICOM series of classic MR images, full of invented patient data."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from cohort import Patient, Scan, array_hash, render
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

BROKEN_KINDS = ("missing_slice", "two_patients", "not_dicom")
"""Ways in which the series of the extra patients are broken, in the order of their use."""

_COLUMNS = ("patient_id", "diagnosis", "age", "sex")


def _header(patient: Patient, session: int, scan: Scan) -> Dataset:
    """Elements that all slices of a series share, except for geometry."""
    who = patient.identity
    key = f"synthmed {patient.seed} {patient.index}"
    date = who.study_dates[session - 1].strftime("%Y%m%d")
    age = patient.age + (who.study_dates[session - 1] - who.study_dates[0]).days / 365.25
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    ds.SOPClassUID = MRImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "094127.250000"
    ds.AccessionNumber = who.accession
    ds.Modality = "MR"
    ds.Manufacturer = "Invented Magnets"
    ds.InstitutionName = who.institution
    ds.InstitutionAddress = who.institution_address
    ds.ReferringPhysicianName = who.physician
    ds.StationName = who.station
    ds.StudyDescription = f"HEAD {who.surname}"
    ds.SeriesDescription = f"T1 {patient.dicom_plane} {who.given}"
    ds.PatientName = who.name
    ds.PatientID = who.patient_id
    ds.PatientBirthDate = who.birth_date.strftime("%Y%m%d")
    ds.PatientSex = patient.sex
    ds.PatientAge = f"{int(age):03d}Y"
    ds.PatientAddress = who.home_address
    ds.PatientComments = who.comment
    ds.PatientPosition = "HFS"
    ds.ImageComments = f"repeat of {who.accession}, {who.physician} informed"
    ds.ScanningSequence = "GR"
    ds.SequenceVariant = "MP"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "3D"
    ds.RepetitionTime = "2300"
    ds.EchoTime = "3"
    ds.InversionTime = "900"
    ds.FlipAngle = "9"
    ds.EchoTrainLength = "1"
    ds.MagneticFieldStrength = "3"
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[key, "study", str(session)])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[key, "series", str(session)])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[key, "frame", str(session)])
    ds.PositionReferenceIndicator = ""
    ds.StudyID = "1"
    ds.SeriesNumber = "3"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = scan.voxels.shape[1], scan.voxels.shape[0]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    if patient.rescale != (1.0, 0.0):
        slope, intercept = patient.rescale
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "US"
    other = Dataset()
    other.PatientID = f"OLD-{who.patient_id}"
    other.IssuerOfPatientID = who.institution
    ds.OtherPatientIDsSequence = [other]
    request = Dataset()
    request.RequestedProcedureDescription = f"rule out atrophy, {who.name}"
    request.RequestingPhysician = who.physician
    ds.RequestAttributesSequence = [request]
    block = ds.private_block(0x0029, "INVENTED MAGNETS HEADER", create=True)
    block.add_new(0x10, "LO", who.name)
    block.add_new(0x11, "UN", f"{who.home_address}|{who.comment}".encode())
    return ds


def series_slices(patient: Patient, session: int, scan: Scan) -> list[FileDataset]:
    """Datasets of a series, in the order of the slices of ``scan``.

    Voxel index i runs along the rows' direction (columns of the image), j down the image, k
    through the slices. DICOM positions are LPS mm, hence the sign change of x and y.
    """
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    along = to_lps[:3, :3] / spacing
    header = _header(patient, session, scan)
    header.PixelSpacing = [f"{spacing[1]:.10g}", f"{spacing[0]:.10g}"]
    header.SliceThickness = f"{spacing[2]:.10g}"
    header.SpacingBetweenSlices = f"{spacing[2]:.10g}"
    header.ImageOrientationPatient = [f"{v:.10f}" for v in (*along[:, 0], *along[:, 1])]
    slices = []
    for k in range(scan.voxels.shape[2]):
        ds = FileDataset(None, {}, preamble=_preamble(patient))
        ds.update(header)
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[header.SeriesInstanceUID, str(k)])
        ds.InstanceNumber = str(k + 1)
        ds.ImagePositionPatient = [f"{v:.8f}" for v in (to_lps @ [0.0, 0.0, k, 1.0])[:3]]
        ds.PixelData = scan.voxels[:, :, k].T.astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta = meta
        slices.append(ds)
    return slices


def _preamble(patient: Patient) -> bytes:
    who = patient.identity
    return f"export for {who.name} {who.patient_id}".encode().ljust(128, b"\0")[:128]


def _write_series(root: Path, patient: Patient, session: int, slices: list[FileDataset]) -> Path:
    """Save slices under names and in an order that say nothing about them."""
    folder = root / f"ST{patient.identity.number:05d}" / f"SE{session:03d}"
    folder.mkdir(parents=True)
    bare = patient.index % 2 == 0
    order = np.random.Generator(np.random.PCG64(patient.index)).permutation(len(slices))
    for place, k in enumerate(order):
        name = f"IM{place + 1:04d}" if bare else f"{0x5A1000 + 7 * place:08X}.dcm"
        slices[k].save_as(folder / name, enforce_file_format=True)
    return folder


def _break(kind: str, slices: list[FileDataset], other: list[FileDataset]) -> list[FileDataset]:
    """Break a series in the way ``kind``; ``other`` is a series of somebody else."""
    middle = len(slices) // 2
    if kind == "missing_slice":
        return slices[:middle] + slices[middle + 1 :]
    if kind == "two_patients":
        for ds in other[middle:]:
            ds.SeriesInstanceUID = slices[0].SeriesInstanceUID
            ds.StudyInstanceUID = slices[0].StudyInstanceUID
        return slices[:middle] + other[middle:]
    return slices


def write_dicom(
    folder: Path,
    patients: Sequence[Patient],
    extra: Sequence[tuple[Patient, Patient]],
    grid: int,
) -> tuple[dict[str, str], list[dict[str, str]], dict[str, str]]:
    """Write series folders and ``labels.csv`` into ``folder``.

    ``extra`` holds the patients of broken series, each with a second person who slips in where
    two patients share a series. Returns what ``write_bids`` returns; broken series are named
    by their folder.
    """
    arrays: dict[str, str] = {}
    broken: dict[str, str] = {}
    for patient in patients:
        for session in range(1, patient.sessions + 1):
            scan = render(patient, session, "dicom", grid)
            slices = series_slices(patient, session, scan)
            _write_series(folder, patient, session, slices)
            arrays[str(slices[0].SeriesInstanceUID)] = array_hash(scan.voxels)
    for i, (patient, stranger) in enumerate(extra):
        kind = BROKEN_KINDS[i % len(BROKEN_KINDS)]
        slices, other = (
            series_slices(who, 1, render(who, 1, "dicom", grid)) for who in (patient, stranger)
        )
        series = _write_series(folder, patient, 1, _break(kind, slices, other))
        if kind == "not_dicom":
            victim = sorted(series.iterdir())[grid // 2]
            victim.write_text(f"{patient.identity.name}: slice lost in transfer\n")
        broken[series.relative_to(folder).as_posix()] = kind
    rows = [
        {
            "patient_id": patient.identity.patient_id,
            "diagnosis": patient.diagnosis,
            "age": f"{patient.age:.1f}",
            "sex": patient.sex,
        }
        for patient in (*patients, *(pair[0] for pair in extra))
    ]
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["patient_id"]))
    return arrays, rows, broken


def read_series(folder: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Series UID, stored voxels int16 (i, j, k) and affine (4, 4) to RAS+ mm of a series."""
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    orientation = np.array(slices[0].ImageOrientationPatient, dtype=float)
    along, down = orientation[:3], orientation[3:]
    slices.sort(key=lambda ds: int(ds.InstanceNumber))
    positions = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)
    voxels = np.stack([ds.pixel_array.T for ds in slices], axis=-1).astype(np.int16)
    rows_mm, columns_mm = (float(v) for v in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = along * columns_mm
    affine[:3, 1] = down * rows_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return str(slices[0].SeriesInstanceUID), voxels, affine


def read_dicom(
    folder: Path, broken: Mapping[str, str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Hashes by series UID and table rows of a written cohort, leaving ``broken`` out."""
    arrays = {}
    for series in sorted(folder.glob("ST*/SE*")):
        if series.relative_to(folder).as_posix() not in broken:
            uid, voxels, _ = read_series(series)
            arrays[uid] = array_hash(voxels)
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as stream:
        return arrays, list(csv.DictReader(stream))
