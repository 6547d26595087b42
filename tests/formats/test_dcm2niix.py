"""dcm2niix as an engine: the same volumes, or a refusal; and no name of a file is told to it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest

from synthmed.errors import UsageError
from synthmed.formats import dcm2niix, stack
from synthmed.formats.refusal import Refused

AFFINE = np.diag([-2.0, 1.5, 3, 1])
DATA = make.voxels(0)
here = pytest.mark.skipif(importlib.util.find_spec("dcm2niix") is None, reason="no dcm2niix")


def named(ds: Any) -> None:
    ds.SeriesDescription, ds.ProtocolName = "Zuleika", "Zuleika"


@here
@pytest.mark.parametrize("layout", ["classic", "mosaic"])
def test_it_makes_the_same_volume(tmp_path: Path, layout: str) -> None:
    if layout == "classic":
        make.series(tmp_path / "s", DATA, AFFINE, lambda k, ds: named(ds))
    else:
        make.mosaic(tmp_path / "s" / "m.dcm", DATA, AFFINE, named)
    found, _, where = make.headers(tmp_path)
    own, other = stack.read(found, where), dcm2niix.read(found, where)
    np.testing.assert_array_equal(other.data, own.data)
    np.testing.assert_allclose(other.affine, own.affine, atol=1e-4)


@here
def test_an_uneven_stack_is_refused_before_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(k: int, ds: Any) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, 0, 3.0 * k + 3 * (k > 4)]

    make.series(tmp_path / "s", DATA, AFFINE, place)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    found, _, where = make.headers(tmp_path)
    with pytest.raises(Refused, match="missing_slices"):
        dcm2niix.read(found, where)


def test_what_it_makes_must_lie_where_the_headers_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that fails, makes two volumes, none, or one half a millimetre away."""
    make.series(tmp_path / "s", DATA, AFFINE)
    found, _, where = make.headers(tmp_path)
    right = stack.read(found, where)
    shifted = right.affine.copy()
    shifted[0, 3] += 0.5
    program = tmp_path / "program"
    monkeypatch.setattr(dcm2niix, "binary", lambda: program)

    def outcome(text: str) -> str:
        program.write_text("#!/bin/sh\n" + text)
        program.chmod(0o755)
        try:
            dcm2niix.read(found, where)
        except Refused as reason:
            return reason.explanation.removeprefix("dcm2niix does not make the volume of it that ")
        return "read"

    make.nifti(tmp_path / "right.nii", right.data, right.affine)
    make.nifti(tmp_path / "away.nii", right.data, shifted)
    copy = 'for last; do :; done; out="${8}"; cp "%s" "$out/v.nii"'
    assert outcome(copy % (tmp_path / "right.nii")) == "read"
    assert outcome(copy % (tmp_path / "away.nii")).endswith("It puts the voxels elsewhere.")
    assert outcome("exit 1") == "its headers describe."
    assert outcome("exit 0").endswith("It made 0 volumes of one.")
    twice = copy % (tmp_path / "right.nii") + '; cp "$out/v.nii" "$out/w.nii"'
    assert outcome(twice).endswith("It made 2 volumes of one.")
    # the names of the files are not passed on
    assert outcome('for last; do :; done; ls "$last" | grep -v "^0000[0-9][0-9].dcm$" && exit 1;'
                   + copy % (tmp_path / "right.nii")) == "read"  # fmt: skip


def test_without_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"(?s)data\.engine.*'\.\[dcm2niix\]'"):
        dcm2niix.binary()


@pytest.mark.parametrize("key", [{"volumes": "split"}, {"tilted": "resample"}])
def test_what_it_cannot_do_is_said_in_the_config(tmp_path: Path, key: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="engine dcm2niix"):
        make.config(tmp_path, engine="dcm2niix", **key)


REAL = os.environ.get("SYNTHMED_REAL_DATA")


@here
@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
@pytest.mark.parametrize(
    "folder",
    ["dicom2nifti/siemens/anatomical/001", "dicom2nifti/hitachi/anatomical/001",
     "dicom2nifti/generic/compressed_j2k/001", "dicom2nifti/generic/compressed_jpegls/001",
     "dicom2nifti/hyperfine/anatomical/001", "dicom2nifti/siemens_multiframe/anatomical/001"],
)  # fmt: skip
def test_both_engines_agree_on_real_series(folder: str) -> None:
    found, _, where = make.headers(Path(str(REAL)) / "dicom/vendors" / folder)
    own, other = stack.read(found, where), dcm2niix.read(found, where)
    np.testing.assert_allclose(other.data, own.data, rtol=1e-5, atol=1e-3)
