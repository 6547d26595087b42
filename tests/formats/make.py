"""Small sources for tests: NIfTI and DICOM files with known voxels, places and people."""

from __future__ import annotations

import gzip
import struct
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
from synthmed.formats import dicom
from synthmed.formats.dicom import Slice
from synthmed.formats.listing import is_auxiliary, kind, walk
from synthmed.formats.refusal import Refused, quiet

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def headers(
    folder: Path,
) -> tuple[list[Slice], dict[str, str], Callable[[str], Path]]:
    """The images of every DICOM file in a folder, codes of those refused, and where they lie."""
    listing = walk(folder)
    slices, refused = [], {}
    with quiet():
        for path in listing.sizes:
            if is_auxiliary(path) or kind(listing, path) != "dicom":
                continue
            try:
                slices += dicom.slices(listing.path(path), path)
            except Refused as reason:
                refused[path] = reason.code
    return slices, refused, listing.path


def config(source: Path | str, **data: Any) -> Config:
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


def enhanced(
    path: Path,
    stacks: Sequence[tuple[np.ndarray, Mapping[str, Any]]],
    affine: np.ndarray,
    change: Callable[[Dataset], None] = lambda ds: None,
    syntax: str = ExplicitVRLittleEndian,
) -> Path:
    """Write stacks of (columns, rows, slices) as one enhanced MR file, its frames shuffled.

    Args:
        stacks: voxels and what tells them apart: `types` (the last values of FrameType), `echo`,
            `b`, `towards`, `stack`, `time`, `slope`, `intercept`.
        affine: voxel index to RAS millimetres.
        change: works on the data set before it is written.
    """
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sides = np.linalg.norm(lps[:3, :3], axis=0)
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.4.1", "MR"
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[path.name, "file"])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "MIXED", "NONE"]
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = f"ID-{path.stem}", "Doe^Jo", "19400101"
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[path.name, "study"])
    ds.StudyDate, ds.StudyTime = "20200102", "101112"
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[path.name, "series"])
    ds.SeriesNumber, ds.InstanceNumber = 3, 1
    ds.Manufacturer = "SIEMENS"
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    turn = (lps[:3, :2] / sides[:2]).T.ravel()
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = decimals(turn)
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = decimals(sides[1::-1])
    ds.SharedFunctionalGroupsSequence = [shared]
    every = [(s, k) for s in range(len(stacks)) for k in range(stacks[s][0].shape[2])]
    frames, planes = [], []
    for at in np.random.default_rng(0).permutation(len(every)):
        s, k = every[at]
        data, told = stacks[s]
        frame = Dataset()
        frame.PlanePositionSequence = [Dataset()]
        place = decimals((lps @ [0, 0, k, 1])[:3])
        frame.PlanePositionSequence[0].ImagePositionPatient = place
        frame.FrameContentSequence = [Dataset()]
        frame.FrameContentSequence[0].TemporalPositionIndex = told.get("time", 1)
        frame.MREchoSequence = [Dataset()]
        frame.MREchoSequence[0].EffectiveEchoTime = told.get("echo", 5.0)
        frame.MRImageFrameTypeSequence = [Dataset()]
        types = ["ORIGINAL", "PRIMARY", *told.get("types", ["M", "NONE"])]
        frame.MRImageFrameTypeSequence[0].FrameType = types
        if "stack" in told:
            frame.FrameContentSequence[0].StackID = told["stack"]
        if "b" in told:
            frame.MRDiffusionSequence = [Dataset()]
            diffusion = frame.MRDiffusionSequence[0]
            diffusion.DiffusionBValue = told["b"]
            if "towards" in told:
                diffusion.DiffusionGradientDirectionSequence = [Dataset()]
                towards = diffusion.DiffusionGradientDirectionSequence[0]
                towards.DiffusionGradientOrientation = told["towards"]
        if "slope" in told:
            frame.PixelValueTransformationSequence = [Dataset()]
            scaling = frame.PixelValueTransformationSequence[0]
            scaling.RescaleSlope = str(told["slope"])
            scaling.RescaleIntercept = str(told.get("intercept", 0))
        frames.append(frame)
        planes.append(np.ascontiguousarray(data[:, :, k].T))
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.NumberOfFrames = len(frames)
    _pixels(ds, np.stack(planes))
    return _saved(path, ds, change, syntax)


def mosaic(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray,
    change: Callable[[Dataset], None] = lambda ds: None,
    n: int | None = None,
) -> Path:
    """Write (columns, rows, slices) as a Siemens mosaic; `n` is the number of slices it claims."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sides = np.linalg.norm(lps[:3, :3], axis=0)
    columns, rows, slices = data.shape
    side = int(np.ceil(np.sqrt(slices)))
    plane = np.zeros((rows * side, columns * side), data.dtype)
    for k in range(slices):
        r, c = divmod(k, side)
        plane[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = data[:, :, k].T
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = MR_IMAGE, "MR"
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[path.name, "file"])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = f"ID-{path.parent.name}", "Doe^Jo", ""
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[path.parent.name, "study"])
    ds.StudyDate, ds.StudyTime = "20200102", "101112"
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[path.parent.name, "series"])
    ds.SeriesNumber, ds.InstanceNumber = 3, 1
    ds.Manufacturer = "SIEMENS"
    turn = lps[:3, :2] / sides[:2]
    ds.ImageOrientationPatient = decimals(turn.T.ravel())
    # the scanner's position is that of a plane of the mosaic's size about the same middle
    away = lps[:3, 0] * (side - 1) * columns / 2 + lps[:3, 1] * (side - 1) * rows / 2
    ds.ImagePositionPatient = decimals(lps[:3, 3] - away)
    ds.PixelSpacing = decimals(sides[1::-1])
    ds.SpacingBetweenSlices = decimals(sides[2:])[0]
    block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    layout = {
        "NumberOfImagesInMosaic": ("US", [str(slices if n is None else n)]),
        "SliceNormalVector": ("FD", [f"{v:.8f}" for v in lps[:3, 2] / sides[2]]),
    }
    block.add_new(0x10, "OB", csa(layout))
    _pixels(ds, plane[None])
    return _saved(path, ds, change, ExplicitVRLittleEndian)


def csa(elements: Mapping[str, tuple[str, Sequence[str]]]) -> bytes:
    """Siemens' private header in its second format."""
    out = b"SV10\4\3\2\1" + struct.pack("<2I", len(elements), 77)
    for name, (vr, values) in elements.items():
        out += struct.pack("<64si4s3i", name.encode(), len(values), vr.encode(), 0, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            out += struct.pack("<4i", 0, len(text), 77, 0) + text + bytes(-len(text) % 4)
    return out


def _pixels(ds: Dataset, planes: np.ndarray) -> None:
    """Put (frames, rows, columns) into a data set."""
    ds.Rows, ds.Columns = planes.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * planes.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(planes.dtype.kind == "i")
    ds.PixelData = planes.tobytes()


def _saved(path: Path, ds: Dataset, change: Callable[[Dataset], None], syntax: str) -> Path:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    change(ds)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
