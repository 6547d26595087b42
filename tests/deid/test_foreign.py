"""Names of patients in a cohort that another tool made: found wherever text is, not in voxels."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from synthmed.deid.foreign import naming
from synthmed.deid.needles import Needles
from synthmed.stages.identifiers import telling
from tests.formats import make

NAME = "Quillfeather"


def nifti(change: Callable[[nib.nifti1.Nifti1Image], None] = lambda image: None) -> bytes:
    image = nib.nifti1.Nifti1Image(make.voxels(0), np.diag([2.0, 2, 2, 1]))
    change(image)
    return image.to_bytes()


def described(image: nib.nifti1.Nifti1Image) -> None:
    image.header["descrip"] = f"of {NAME}".encode()


def commented(image: nib.nifti1.Nifti1Image) -> None:
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"of {NAME}".encode()))


def named(content: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(f"{NAME}.nii", "wb", fileobj=out, mtime=0) as handle:
        handle.write(content)
    return out.getvalue()


def spelt_in_voxels() -> bytes:
    content = bytearray(nifti())
    content[600 : 600 + len(NAME)] = NAME.encode()
    return bytes(content)


@pytest.mark.parametrize(
    ("path", "content", "found"),
    [
        ("a.nii.gz", gzip.compress(nifti(), mtime=0), False),
        (f"{NAME}_T1w.nii.gz", gzip.compress(nifti(), mtime=0), True),
        (f"{NAME.upper()}/a.nii", nifti(), True),
        ("a.nii.gz", gzip.compress(nifti(described), mtime=0), True),
        ("a.nii", nifti(described), True),
        ("a.nii.gz", gzip.compress(nifti(commented), mtime=0), True),
        ("a.nii.gz", named(nifti()), True),
        ("a.nii", spelt_in_voxels(), False),
        ("participants.tsv", f"participant_id\nsub-{NAME}\n".encode(), True),
        ("sub-1_T1w.json", f'{{"by": "{NAME}"}}'.encode(), True),
        ("notes.txt", f"after {NAME.lower()}".encode("utf-16"), True),
        ("notes.txt.gz", gzip.compress(f"after {NAME}".encode(), mtime=0), True),
        ("broken.nii.gz", b"\x1f\x8b nothing", False),
        ("empty.nii", b"", False),
    ],
)
def test_where_a_name_is_found(tmp_path: Path, path: str, content: bytes, found: bool) -> None:
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    assert naming(tmp_path, {NAME, "Holloway"}, {"Holloway"}) == [[path] if found else [], []]


@pytest.mark.parametrize(
    ("text", "found"),
    [("Subj1", True), ("Subj10", False), ("xSubj1_a", True), ("2019-a", True), ("12019-a", False)],
)
def test_a_number_at_the_end_of_a_name_ends_there(tmp_path: Path, text: str, found: bool) -> None:
    (tmp_path / "participants.tsv").write_text(f"participant_id\n{text}\n")
    assert naming(tmp_path, {"Subj1", "2019-a"}) == [["participants.tsv"] if found else []]
    # where nobody else is numbered, what goes on behind an id is taken for it all the same
    assert Needles(["Subj1"]).found_in(b"Subj10", shortest=4)


def test_dicom_headers_are_searched_and_pixels_are_not(tmp_path: Path) -> None:
    def person(k: int, ds: Dataset) -> None:
        ds.PatientName = f"{NAME}^Anna" if k == 1 else "Synthetic^One"
        ds.PixelData = NAME.encode() + ds.PixelData[len(NAME) :]

    make.series(tmp_path / "s", make.voxels(0), np.diag([-1.0, -1, 2, 1]), person)
    assert [len(paths) for paths in naming(tmp_path, {NAME})] == [1]


def test_what_any_cohort_may_call_a_file_tells_nothing() -> None:
    usual = {"sub-01", "sub-0001", "image_003", "T1w", "ses-1", "scan12", "patient007", "p1"}
    assert telling(usual) == set()
    own = {"OAS1_0001", "sub-Quillfeather", "Holloway", "20190304", "x483920"}
    assert telling(own | usual) == own
