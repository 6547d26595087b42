"""A cohort of single slices: volumes of one voxel along one axis, from file to release."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import Result

from synthmed.formats import nifti
from synthmed.metrics.descriptor import describe
from synthmed.report.mosaic import three_planes


@pytest.fixture(scope="module")
def slices(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The axial slice through the middle of each phantom; one file has two axes, one is whole."""
    folder = tmp_path_factory.mktemp("slices") / "bids"
    shutil.copytree(cohort, folder, ignore=shutil.ignore_patterns("derivatives"))
    made = 0
    for file in sorted(folder.rglob("*_T1w.nii.gz")):
        try:
            image = nib.as_closest_canonical(nib.load(file))
            voxels = np.asanyarray(image.dataobj)
        except Exception:  # planted: broken files stay as they are
            continue
        if voxels.ndim != 3:
            continue
        made += 1
        if made == 1:
            continue
        middle = voxels[:, :, voxels.shape[2] // 2]
        # the first with two axes, the others with a third one of length one
        nib.save(nib.Nifti1Image(middle if made == 2 else middle[:, :, None], image.affine), file)
    return folder


@pytest.fixture(scope="module")
def run(
    slices: Path,
    make_config: Callable[..., Path],
    synthmed: Callable[..., Result],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    config = make_config(
        "slices", data__source=str(slices), data__grid=[16, 16, 1], data__spacing_mm=[12, 12, 12]
    )
    path = tmp_path_factory.mktemp("run") / "run"
    result = synthmed("generate", config, "--run", path)
    assert result.code == 0, result.err
    return path


def test_slices_are_released_as_slices(run: Path) -> None:
    files = sorted((run / "release").rglob("*_T1w.nii.gz"))
    assert len(files) == 18
    for file in files:
        image = nib.load(file)
        assert image.shape == (16, 16, 1)
        assert np.asanyarray(image.dataobj).std() > 0


def test_what_is_not_a_slice_is_refused_by_name(run: Path) -> None:
    with (run / "private/ingest/quarantine.tsv").open(encoding="utf-8") as handle:
        reasons = Counter(row["reason"] for row in csv.DictReader(handle, delimiter="\t"))
    assert reasons["not_a_slice"] == 1
    assert "too_small" not in reasons


def test_a_slice_among_volumes_is_refused_and_told_what_to_ask_for(
    slices: Path, make_config: Callable[..., Path], synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    config = make_config("volumes", data__source=str(slices))
    result = synthmed("ingest", tmp_path / "run", "--config", config)
    assert result.code == 3
    assert "too_small" in result.err
    (left,) = (tmp_path / "run").rglob("quarantine.tsv")
    assert left.read_text(encoding="utf-8").count("data.grid has a side of 1") == 26


def test_the_report_shows_one_plane(run: Path) -> None:
    page = (run / "private/report/report.html").read_text(encoding="utf-8")
    assert "Each scan is a single slice" in page
    assert "coronal" not in page.split('id="volumes"')[1].split("<h3>")[0]
    report = json.loads((run / "private/report/report.json").read_text(encoding="utf-8"))
    assert report["data"]["slices"] is True
    pictures = sorted((run / "private/report/images").glob("synthetic-*.png"))
    assert pictures
    for picture in pictures:
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (128, 128)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_plane_that_is_shown_is_that_of_the_slice(axis: int) -> None:
    rng = np.random.default_rng(0)
    shape = [16, 16, 16]
    shape[axis] = 1
    volume = rng.random(shape).astype(np.float32)
    whole = three_planes(np.repeat(volume, 16, axis), np.eye(4))
    square = 2 - axis  # axial, coronal, sagittal
    expected = whole[:, square * 130 : square * 130 + 128]
    # percentiles of so few voxels differ a little from those of a stack
    apart = np.abs(three_planes(volume, np.eye(4)).astype(int) - expected)
    assert apart.max() <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grey_values_gradients_and_tissue_are_those_of_a_stack_of_the_slice(axis: int) -> None:
    """A stack of equal slices has no gradient across them, and the same shares of everything."""
    rng = np.random.default_rng(1)
    shape = [12, 12, 12]
    shape[axis] = 1
    one = rng.random(shape).astype(np.float32)
    a, b = (describe(v[None, None])[0] for v in (one, np.repeat(one, 9, axis)))
    np.testing.assert_allclose(a[36:47], b[36:47], rtol=1e-6)  # gradients, tissue counts
    across, along = [axis, axis + 3], [i for i in range(6) if i % 3 != axis]
    np.testing.assert_allclose(a[47:][along], b[47:][along], rtol=1e-6)
    assert (a[47:][across] == 0).all() and (b[47:][across] > 0.2).all()


def test_a_file_of_two_axes_is_a_slice(tmp_path: Path) -> None:
    voxels = np.arange(12 * 9, dtype=np.int16).reshape(12, 9)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 3, 4, 1])), tmp_path / "x.nii.gz")
    image = nifti.read(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(image.data, voxels[:, :, None])
    assert image.spacing_mm == (2, 3, 4)
