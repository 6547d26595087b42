"""Files made to do harm, and files changed at random: refused by name or read rightly."""

from __future__ import annotations

import gzip
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from synthmed.deid.clean import Cleaner
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.formats import dicom, nifti, stack
from synthmed.formats.nifti import MAX_VOXELS, Image
from synthmed.formats.refusal import REASONS, Refused, quiet

REAL = os.environ.get("SYNTHMED_REAL_DATA")
AFFINE = np.diag([-2.0, 1.5, 3, 1])
NAME = b"Fotheringay"
GIB = 1 << 30

Change = tuple[str, float, bytes]
"""What is done to the bytes of a file, where (as a part of its length), and with what."""
changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "insert", "cut", "twice"]),
        st.floats(0, 1, allow_nan=False),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from([b"\xff\xff\xff\xff", b"\xfe\xff\xff\x7f", b"\x00\x00\x00\x80", b"SQ"]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, todo: list[Change], header: int) -> bytes:
    """`content` with the changes made, most of them within its first `header` bytes."""
    out = bytearray(content)
    for k, (what, where, value) in enumerate(todo):
        at = int(where * min(header if k % 4 < 3 else len(out), len(out) - 1))
        if what == "flip":
            out[at] ^= value[0] or 1
        elif what == "put":
            out[at : at + len(value)] = value
        elif what == "insert":
            out[at:at] = value
        elif what == "cut":
            del out[max(at, 1) :]
        else:
            out[at:at] = out[at : at + 64 * len(value)]
    return bytes(out)


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` gives, or the code of its refusal."""
    try:
        return read()
    except Refused as reason:
        return reason.code


def check(found: Image | str) -> None:
    """A volume within bounds, or a known reason."""
    if isinstance(found, str):
        assert found in REASONS
        return
    assert found.data.ndim == 3 and 0 < found.data.size <= MAX_VOXELS
    assert np.isfinite(found.data).all() and np.isfinite(found.affine).all()
    assert abs(np.linalg.det(found.affine[:3, :3])) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def originals(folder: Path) -> dict[str, bytes]:
    """A file of each kind, small, with a name in it."""
    data = make.voxels(0, (6, 5, 4))

    def named(ds: Dataset) -> None:
        ds.PatientName, ds.PatientID = "Fotheringay^Zuleika", "MRN771199"

    make.nifti(folder / "plain.nii", data, AFFINE)
    make.enhanced(folder / "enhanced", [(data, {})], AFFINE, named)
    make.mosaic(folder / "mosaic", make.voxels(1, (8, 8, 4)), AFFINE, named)
    make.series(folder / "series", data, AFFINE, lambda k, ds: named(ds))
    first = sorted((folder / "series").iterdir())[0]
    return {
        "nii": (folder / "plain.nii").read_bytes(),
        "nii.gz": gzip.compress((folder / "plain.nii").read_bytes()),
        "classic": first.read_bytes(),
        "enhanced": (folder / "enhanced").read_bytes(),
        "mosaic": (folder / "mosaic").read_bytes(),
    }


@settings(max_examples=400, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["nii", "nii.gz"]), todo=changes)
def test_changed_nifti(
    kind: str, todo: list[Change], folder: Path, originals: dict[str, bytes]
) -> None:
    path = folder / f"changed.{kind}"
    path.write_bytes(changed(originals[kind], todo, 352))
    with quiet():
        check(outcome(lambda: nifti.read(path)))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["classic", "enhanced", "mosaic"]), todo=changes)
def test_changed_dicom(
    kind: str, todo: list[Change], folder: Path, originals: dict[str, bytes]
) -> None:
    """Among its own slices, where it is one of several; and through the cleaner."""
    content = changed(originals[kind], todo, 1500)
    path = folder / "changed.dcm"
    path.write_bytes(content)
    beside = sorted((folder / "series").iterdir())[1:] if kind == "classic" else []

    def read() -> Image:
        found = [s for p in [path, *beside] for s in dicom.slices(p, str(p))]
        for group in dicom.series(found):
            dicom.patient(group)
        return stack.read(found, Path)

    def clean() -> bytes:
        data = dicom.dataset(path, None, stop_before_pixels=False)
        try:
            return Cleaner(Pseudonyms(bytes(32))).clean(data)[1]
        except (Refused, MemoryError, RecursionError):
            raise
        except Exception:  # as its caller does
            raise Refused("header_unreadable") from None

    with quiet():
        check(outcome(read))
        found = outcome(clean)
        if isinstance(found, str):
            assert found in REASONS
            return
        assert NAME.lower() not in found.lower() and b"MRN771199" not in found
        pydicom.dcmread(io.BytesIO(found))


def test_the_changes_do_not_break_everything(folder: Path, originals: dict[str, bytes]) -> None:
    """Or the two tests above would show little: unchanged files are read, of all kinds."""
    for kind in ("nii", "nii.gz"):
        (folder / f"same.{kind}").write_bytes(originals[kind])
        assert nifti.read(folder / f"same.{kind}").data.size == 120
    for path in ("enhanced", "mosaic"):
        assert stack.read(dicom.slices(folder / path, path), folder.joinpath).data.size > 100


def measured(folder: Path) -> None:
    """Read what is below a folder, file by file; print what each took, and all together."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        found = outcome(lambda p=path: _said(p))
        print(
            path.relative_to(folder),
            found,
            resource.getrusage(resource.RUSAGE_SELF).ru_utime - start,
        )
    after = resource.getrusage(resource.RUSAGE_SELF)
    print("grown", (after.ru_maxrss - before.ru_maxrss) * 1024, "")


def _said(path: Path) -> str:
    """How a file was read; a NIfTI rightly, where nibabel, which nothing bounds, reads the same."""
    if ".nii" not in path.name:
        return f"{len(dicom.slices(path, path.name))}_slices"
    image = nifti.read(path)
    content = path.read_bytes()  # a name ending .gz can lie
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    there = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(plain))
    same = np.array_equal(image.data, np.asarray(there.dataobj))
    return "read" if same and np.allclose(image.affine, there.affine) else "WRONG"


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
def test_hostile_files_stay_in_bounds() -> None:
    """Each in ten seconds of a core, all within 2 GiB, refused by name or read as nibabel does."""
    words = [sys.executable, __file__, str(Path(str(REAL), "hostile"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True)
    *files, last = (line.split(" ") for line in done.stdout.splitlines())
    outcomes = {}
    for name, found, seconds in files:
        assert float(seconds) < 10 and found != "WRONG", name
        outcomes[name] = found
    assert last[0] == "grown" and int(last[1]) < 2 * GIB
    assert sum(found == "read" for found in outcomes.values()) >= 3
    named = {found for found in outcomes.values() if not found.endswith("_slices")}
    assert named - {"read"} <= set(REASONS)
    assert {"truncated", "header_unreadable", "not_3d", "not_finite"} <= named


if __name__ == "__main__":
    with quiet():
        measured(Path(sys.argv[1]))
