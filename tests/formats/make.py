"""Small sources for tests: NIfTI and DICOM files with known voxels, places and people."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from synthmed.config import Config
from synthmed.configfile import validate

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def config(source: Path, **data: Any) -> Config:
    """A config that reads `source`."""
    tree = {
        "data": {"source": str(source), "grid": [16, 16, 16], **data},
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
    }
    return validate(tree, "test")


def voxels(seed: int, shape: Sequence[int] = (12, 10, 9)) -> np.ndarray:
    """Random int16 voxels that differ between seeds and under every flip or swap."""
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def nifti(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray | None = None,
    change: Callable[[Any], None] = lambda header: None,
) -> Path:
    """Write a NIfTI file; `change` works on its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2, 2, 1]) if affine is None else affine
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    change(header)
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw), 1) if path.suffix == ".gz" else bytes(raw))
    return path


def table(path: Path, rows: Sequence[Mapping[str, object]], delimiter: str = "\t") -> Path:
    """Write a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [delimiter.join(rows[0])]
    lines += [delimiter.join(str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def cohort(folder: Path, n: int = 10, order: Sequence[int] | None = None, **columns: Any) -> Path:
    """`n` patients with one image each, named by a table; files are made in `order`."""
    rows = [
        {
            "participant_id": f"sub-{i:02d}",
            "image": f"images/scan{i:02d}.nii.gz",
            **{name: of(i) for name, of in columns.items()},
        }
        for i in range(n)
    ]
    for i in order or range(n):
        nifti(folder / f"images/scan{i:02d}.nii.gz", voxels(i))
    table(folder / "participants.tsv", rows)
    return folder


def decimals(values: np.ndarray) -> list[str]:
    """Numbers as DICOM decimal strings of at most 16 characters."""
    return [format_number_as_ds(float(v)) for v in values]


def series(
    folder: Path,
    data: np.ndarray,
    affine: np.ndarray,
    change: Callable[[int, Dataset], None] = lambda k, ds: None,
    syntax: str = ExplicitVRLittleEndian,
    **elements: Any,
) -> Path:
    """Write (columns, rows, slices) as a classic MR series.

    Args:
        affine: voxel index to RAS millimetres.
        change: works on each slice's data set before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sides = np.linalg.norm(lps[:3, :3], axis=0)
    uid = generate_uid(entropy_srcs=[folder.name, "series"])
    study = generate_uid(entropy_srcs=[folder.name, "study"])
    for k in range(data.shape[2]):
        ds = Dataset()
        ds.SOPClassUID, ds.Modality = MR_IMAGE, "MR"
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[folder.name, str(k)])
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
        ds.PatientID, ds.PatientName, ds.PatientBirthDate = (
            f"ID-{folder.name}",
            "Doe^Jo",
            "19400101",
        )
        ds.PatientAge, ds.PatientSex = "067Y", "F"
        ds.StudyInstanceUID, ds.StudyDate, ds.StudyTime = study, "20200102", "101112"
        ds.SeriesInstanceUID, ds.SeriesNumber, ds.InstanceNumber = uid, 3, k + 1
        ds.Manufacturer, ds.MagneticFieldStrength = "SIEMENS", "3"
        ds.ImageOrientationPatient = [
            format_number_as_ds(float(v)) for v in (lps[:3, :2] / sides[:2]).T.ravel()
        ]
        ds.ImagePositionPatient = [format_number_as_ds(float(v)) for v in (lps @ [0, 0, k, 1])[:3]]
        ds.PixelSpacing = [
            format_number_as_ds(float(sides[1])),
            format_number_as_ds(float(sides[0])),
        ]
        plane = np.ascontiguousarray(data[:, :, k].T)
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 8 * plane.itemsize
        ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(plane.dtype.kind == "i")
        ds.PixelData = plane.tobytes()
        for name, value in elements.items():
            setattr(ds, name, value)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        change(k, ds)
        if "SOPClassUID" in ds:
            ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        # the names' order says nothing of the slices' order
        ds.save_as(folder / f"IM{k * 389 % 997:04d}", enforce_file_format=True)
    return folder
