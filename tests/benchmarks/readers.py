"""DICOM readers side by side on scanners' own series, in docs/benchmarks.md.

    pip install dcm2niix dicom2nifti SimpleITK highdicom
    SYNTHMED_REAL_DATA=... python tests/benchmarks/readers.py

Each reader gets the same folders. It is right where it gives the volumes of the reference, all of
them and no others, in their places; or, where there is no volume to be had, gives none. A volume
that is none of the reference's is wrong, and so is one too few of several without an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from synthmed.formats import dcm2niix, dicom, stack
from synthmed.formats.listing import is_auxiliary, kind, walk
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.volumes import volumes
from tests.benchmarks.cohorts import publish, real_data
from tests.formats import make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- readers:begin -->", "<!-- readers:end -->"
PLACE_MM = 1e-2
"""How far a voxel may lie from its place."""
VALUE = 1e-4
"""How far a value may be off, as a part of the largest; one factor a volume is free."""

Volume = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
Reader = Callable[[Path], list[Volume]]


@dataclass(frozen=True)
class Case:
    """A folder with one series.

    Args:
        kind: what the table calls it.
        folder: below the real data.
        files: reference volumes, 3D or 4D; none where there is none to be had.
    """

    kind: str
    folder: str
    files: tuple[str, ...] = ()


def cases(root: Path) -> list[Case]:
    """All series there are, with their references."""
    out = [
        Case("multi-frame, several volumes", "dicom/vendors/dcm_qa_enh/In/Philips",
             ("dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e1.nii",
              "dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e2_fieldmaphz.nii")),
        Case("multi-frame, several volumes", "dicom/vendors/dcm_qa_enh/In/Siemens/XA10",
             ("dcm_qa_enh/Ref/Siemens_REST1_w_SMS_PF7-8_6.nii",)),
        Case("mosaic, several volumes", "dicom/vendors/dcm_qa_12bit/In",
             tuple(f"dcm_qa_12bit/Ref/{k}.nii" for k in (2, 3, 4))),
    ]  # fmt: skip
    for n, direction in ((3, "AP"), (4, "PA"), (5, "RL"), (6, "LR")):
        folder = f"dicom/vendors/dcm_qa_nih/In/20180918Si/mr_000{n}"
        reference = f"dcm_qa_nih/Ref/EPI_PE={direction}_{n}.nii"
        out.append(Case("mosaic, several volumes", folder, (reference,)))
    for n in (4, 5, 6, 7):
        folder = f"dicom/vendors/dcm_qa_nih/In/20180918GE/mr_000{n}"
        reference = f"dcm_qa_nih/Ref/DCM2NIIX_regression_test_{n}.nii"
        out.append(Case("classic, several volumes", folder, (reference,)))
    vendors = root / "dicom" / "vendors"
    for truth in sorted(vendors.glob("dicom2nifti/**/*_ground_truth.nii.gz")):
        folder = truth.parent / truth.name.removesuffix("_ground_truth.nii.gz")
        where = str(folder.relative_to(root))
        if "rgb" in where or "single_slice" in where:
            out.append(Case("no volume: colour, single slice", where))
            continue
        name = "classic"
        if "compressed" in where:
            name = "classic, compressed"
        elif "hyperfine" in where or "multiframe" in where:
            name = "multi-frame"
        out.append(Case(name, where, (str(truth.relative_to(vendors)),)))
    for folder in sorted((root / "dicom" / "refuse").glob("*/001")):
        out.append(Case("no volume: tilted, mixed, too few", str(folder.relative_to(root))))
    hostile = ("duplicate_position", "missing_middle_slices", "no_pixelspacing",
               "two_patients_one_series")  # fmt: skip
    return out + [Case("no volume: made to be wrong", f"hostile/dicom/{h}") for h in hostile]


# --- the readers: the volumes they make of a folder, in RAS+, or an error ------------------------


def synthmed(folder: Path) -> list[Volume]:
    """This package, with `volumes: split`."""
    slices, refused, where = make.headers(folder)
    for code in refused.values():
        raise Refused(code)
    out = []
    with quiet():
        for group in dicom.series(slices):
            dicom.patient(group)
            for volume in volumes(group.slices):
                image = stack.read(volume.slices, where)
                out.append((image.data.astype(np.float64), image.affine))
    return out


def of_dcm2niix(folder: Path) -> list[Volume]:
    """dcm2niix as it is called by hand."""
    with tempfile.TemporaryDirectory() as out:
        words = ["-b", "n", "-z", "n", "-f", "%s_%t_%e", "-o", out, str(folder)]
        call = [str(dcm2niix.binary()), *words]
        subprocess.run(call, capture_output=True, timeout=120, check=True)
        return [v for file in sorted(Path(out).glob("*.nii")) for v in of_nifti(file)]


def of_dicom2nifti(folder: Path) -> list[Volume]:
    """dicom2nifti, which leaves the axes as they are."""
    import dicom2nifti  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as out:
        file = Path(out, "volume.nii")
        dicom2nifti.dicom_series_to_nifti(str(folder), str(file), reorient_nifti=False)
        return of_nifti(file)


def of_simpleitk(folder: Path) -> list[Volume]:
    """SimpleITK's series reader, series by series."""
    import SimpleITK as sitk  # type: ignore[import-not-found]  # noqa: N813

    out = []
    reader = sitk.ImageSeriesReader()
    for uid in reader.GetGDCMSeriesIDs(str(folder)):
        files = reader.GetGDCMSeriesFileNames(str(folder), uid)
        reader.SetFileNames(files)
        image = reader.Execute() if len(files) > 1 else sitk.ReadImage(files[0])
        if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
            raise ValueError("no volume of numbers")
        affine = np.eye(4)
        turn = np.array(image.GetDirection()).reshape(3, 3)
        affine[:3, :3] = turn * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        data = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        out.append(upright(data, np.diag([-1.0, -1, 1, 1]) @ affine))
    return out


def of_highdicom(folder: Path) -> list[Volume]:
    """highdicom: a series of single images, else each multi-frame file."""
    import highdicom as hd  # type: ignore[import-not-found]
    import pydicom

    listing = walk(folder)
    sets = [
        pydicom.dcmread(listing.path(p), force=True)
        for p in listing.sizes
        if not is_auxiliary(p) and kind(listing, p) == "dicom"
    ]
    if any("NumberOfFrames" in ds and int(ds.NumberOfFrames) > 1 for ds in sets):
        made = [hd.Image.from_dataset(ds).get_volume() for ds in sets]
    else:
        made = [hd.get_volume_from_series(sets)]
    if any(v.array.ndim != 3 for v in made):
        raise ValueError("no volume of numbers")
    return [upright(v.array, np.diag([-1.0, -1, 1, 1]) @ v.affine) for v in made]


READERS: dict[str, Reader] = {
    "synthmed": synthmed,
    "dcm2niix": of_dcm2niix,
    "dicom2nifti": of_dicom2nifti,
    "SimpleITK": of_simpleitk,
    "highdicom": of_highdicom,
}


# --- what comes of it -----------------------------------------------------------------------------


def of_nifti(file: Path) -> list[Volume]:
    """The volumes of a NIfTI file, one after the other."""
    image = nib.load(file)
    data = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    if data.dtype.kind not in "iuf":
        raise ValueError("colour")
    every = [data[..., t] for t in range(data.shape[3])] if data.ndim == 4 else [data]
    return [upright(d, image.affine) for d in every]  # type: ignore[attr-defined]


def upright(data: npt.NDArray[Any], affine: npt.NDArray[Any]) -> Volume:
    """In RAS+, by flips and swaps."""
    turned = nib.as_closest_canonical(nib.Nifti1Image(data.astype(np.float64), affine))
    return turned.get_fdata(), turned.affine


def same(a: Volume, b: Volume) -> bool:
    """The same values, up to one factor, in the same places."""
    if a[0].shape != b[0].shape:
        return False
    ends = np.array([[0, 0, 0, 1], [*(n - 1 for n in a[0].shape), 1]]).T
    if np.abs((a[1] - b[1]) @ ends).max() > PLACE_MM:
        return False
    top = [max(np.abs(v).max(), 1e-12) for v in (a[0], b[0])]
    return bool(np.abs(a[0] / top[0] - b[0] / top[1]).max() <= VALUE)


def outcome(reader: Reader, case: Case, root: Path) -> str:
    """right, refused or wrong."""
    expected = [v for f in case.files for v in of_nifti(root / "dicom" / "vendors" / f)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader(root / case.folder)
    except ModuleNotFoundError:
        raise
    except (Exception, Refused):  # whatever a reader raises, it has refused
        found = []
    if not found:
        return "refused" if expected else "right"
    left = list(expected)
    for volume in found:
        match = next((k for k, e in enumerate(left) if same(volume, e)), None)
        if match is None:
            return "wrong"
        del left[match]
    return "wrong" if left else "right"


@contextlib.contextmanager
def silence() -> Iterable[None]:  # type: ignore[misc]
    """Libraries in C print to the terminal."""
    keep = [os.dup(n) for n in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for n in (1, 2):
            os.dup2(nowhere.fileno(), n)
        try:
            yield
        finally:
            for n, k in zip((1, 2), keep, strict=True):
                os.dup2(k, n)
                os.close(k)


def table(root: Path, readers: Sequence[str]) -> str:
    """A row a kind: right / refused / wrong."""
    counts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in cases(root):
        for name in readers:
            with silence():
                said = outcome(READERS[name], case, root)
            counts[case.kind][name].append(said)
            print(f"{said:<8} {name:<12} {case.folder}", file=sys.stderr)
    lines = ["| | series | " + " | ".join(readers) + " |", "|---|" + "---|" * (len(readers) + 1)]
    for row, by_reader in counts.items():
        n = len(by_reader[readers[0]])
        cells = [
            " / ".join(str(by_reader[r].count(s)) for s in ("right", "refused", "wrong"))
            for r in readers
        ]
        lines.append(f"| {row} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="DICOM readers side by side.")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    versions = ", ".join(f"{n} {version(n.lower())}" for n in options.readers[1:])
    text = f"`python tests/benchmarks/readers.py`; right / refused / wrong; {versions}:\n\n"
    text += table(root, options.readers)
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
