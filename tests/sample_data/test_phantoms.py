"""Phantoms: known volumes, sides, separable labels, reproducible bytes, planted identities."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

SAMPLE_DATA = Path(__file__).resolve().parents[2] / "sample_data"
sys.path.insert(0, str(SAMPLE_DATA))

anatomy = importlib.import_module("anatomy")
cohort = importlib.import_module("cohort")
dicom_files = importlib.import_module("dicom_files")
nifti_files = importlib.import_module("nifti_files")
phantoms = importlib.import_module("phantoms")

SMALL = phantoms.Spec("bids", patients=4, grid=32, seed=5, broken=5)
VOLUMES = ("ventricles_mm3", "hippocampus_left_mm3", "hippocampus_right_mm3")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "small"
    phantoms.make_cohort(folder, SMALL, check=True)
    return folder


def world_x(labels, affine, value):
    """Mean RAS x (mm) of the voxels that carry ``value``."""
    index = np.argwhere(labels == value)
    return float((index @ affine[:3, :3].T + affine[:3, 3])[:, 0].mean())


def patients_by(field, layout_values):
    """One patient of each storage variant."""
    found = {}
    for patient in cohort.make_patients(11, 40)[0]:
        found.setdefault(getattr(patient, field), patient)
    assert set(found) == set(layout_values)
    return found


# -- anatomy


def test_default_volumes_agree_with_much_finer_sums():
    for patient in cohort.make_patients(3, 4)[0]:
        coarse = anatomy.region_volumes(patient.anatomy)
        fine = anatomy.region_volumes(patient.anatomy, 1.2, 0.9)
        assert coarse == pytest.approx(fine, rel=0.02)


def test_mask_volumes_match_known_volumes():
    """Voxels of 4.8 mm count a hippocampus to 35 % in one patient, and to 4 % on average."""
    errors = []
    for patient in cohort.make_patients(3, 24)[0]:
        scan = cohort.render(patient, 1, "bids", 40)
        voxel = abs(np.linalg.det(scan.affine[:3, :3]))
        masks = np.array([np.sum(scan.labels == k) * voxel for k in (1, 2, 3)])
        truth = anatomy.region_volumes(patient.anatomy)
        errors.append(masks / [truth[name] for name in VOLUMES] - 1.0)
    errors = np.array(errors)
    assert np.abs(errors[:, 0]).max() < 0.20
    assert np.abs(errors[:, 1:]).max() < 0.35
    assert np.abs(errors.mean(axis=0)).max() < 0.04


def test_mask_volumes_converge_on_a_finer_grid():
    patient = cohort.make_patient(3, 0)
    scan = cohort.render(patient, 1, "bids", 64)
    truth = anatomy.region_volumes(patient.anatomy)
    for value, name in enumerate(VOLUMES, start=1):
        volume = np.sum(scan.labels == value) * (anatomy.FOV_MM / 64) ** 3
        assert volume == pytest.approx(truth[name], rel=0.12)


def test_fractions_are_shares_of_a_voxel():
    points = np.random.default_rng(0).uniform(-96.0, 96.0, (3, 20_000))
    fractions = anatomy.tissue_fractions(points, cohort.make_patient(1, 0).anatomy, 4.8)
    assert min(share.min() for share in fractions.values()) >= 0.0
    assert sum(fractions.values()).max() < 1.0 + 1e-9


def test_nothing_is_lost_by_skipping_far_points():
    """The largest heads stay inside the hull beyond which points are not evaluated."""
    axis = np.linspace(-96.0, 96.0, 32)
    points = np.stack(np.meshgrid(axis, axis, axis)).reshape(3, -1)
    for latents in (np.full(9, 2.0), np.full(9, -2.0), np.array([2.0, -2, 2, 2, 0, 0, 0, 0, 0])):
        shape = anatomy.Anatomy.from_latents(latents, "control", 60.0, "M")
        fast = anatomy.tissue_fractions(points, shape, 6.0)
        full = anatomy._fractions(*anatomy._template(points, shape), shape, 6.0)
        for name, share in full.items():
            assert np.abs(share - fast[name]).max() < 1e-9


def test_contrast_is_that_of_a_t1_weighted_head():
    scan = cohort.render(cohort.make_patient(2, 0), 1, "bids", 40)
    mean = {name: scan.voxels[scan.labels == k].mean() for k, name in anatomy.LABELS.items()}
    assert mean["ventricles"] < 0.6 * mean["grey_matter"]
    assert mean["grey_matter"] < 0.85 * mean["white_matter"]
    assert scan.voxels.dtype == np.int16
    assert scan.voxels.min() >= 0 and scan.voxels.max() <= 4095


# -- sides


def test_left_is_left_in_every_nifti_variant():
    variants = patients_by("bids_variant", ("RAS", "LAS", "permuted", "oblique"))
    for variant, patient in variants.items():
        for session in (1, 2):
            scan = cohort.render(patient, session, "bids", 32)
            assert world_x(scan.labels, scan.affine, 2) < -15.0, variant
            assert world_x(scan.labels, scan.affine, 3) > 15.0, variant
    codes = {v: nib.aff2axcodes(cohort.scan_affine(p, "bids", 32)) for v, p in variants.items()}
    assert codes["RAS"] == ("R", "A", "S")
    assert codes["LAS"] == ("L", "A", "S")
    assert codes["permuted"] not in (("R", "A", "S"), ("L", "A", "S"))
    oblique = cohort.scan_affine(variants["oblique"], "bids", 32)[:3, :3] / 6.0
    assert 4.0 < np.rad2deg(np.arccos((np.trace(oblique) - 1.0) / 2.0)) < 10.5


def test_left_is_left_in_every_dicom_plane(tmp_path):
    planes = patients_by("dicom_plane", ("axial", "sagittal", "coronal", "oblique"))
    for plane, patient in planes.items():
        scan = cohort.render(patient, 1, "dicom", 32)
        slices = dicom_files.series_slices(patient, 1, scan)
        folder = dicom_files._write_series(tmp_path, patient, 1, slices)
        uid, voxels, affine = dicom_files.read_series(folder)
        assert uid == slices[0].SeriesInstanceUID
        np.testing.assert_array_equal(voxels, scan.voxels)
        np.testing.assert_allclose(affine, scan.affine, atol=1e-4)
        assert world_x(scan.labels, affine, 2) < -15.0, plane
        assert world_x(scan.labels, affine, 3) > 15.0, plane


def test_world_space_anatomy_does_not_depend_on_the_stored_grid():
    """Ventricles of the same head lie at the same place in mm, however they are stored."""
    shape = cohort.make_patient(4, 0).anatomy
    centres = []
    for axes in (("R", "A", "S"), ("L", "P", "I"), ("P", "S", "R")):
        affine = cohort.make_affine(axes, 40)
        index = np.indices((40, 40, 40)).reshape(3, -1).astype(float)
        world = affine[:3, :3] @ index + affine[:3, 3:]
        labels = anatomy.label_map(anatomy.tissue_fractions(world, shape, 4.8))
        centres.append(world[:, labels == 1].mean(axis=1))
    np.testing.assert_allclose(centres[1:], [centres[0]] * 2, atol=1e-9)


# -- labels


def test_labels_are_balanced_and_separable_by_volumes():
    patients = cohort.make_patients(7, 160)[0]
    ill = np.array([p.diagnosis == "atrophy" for p in patients])
    assert ill.mean() == 0.5
    assert np.mean([p.sex == "F" for p in patients]) == 0.5
    ages = np.array([p.age for p in patients])
    assert ages.min() >= 45.0 and ages.max() <= 95.0
    assert abs(np.corrcoef(ages, ill)[0, 1]) < 0.25
    volumes = [list(anatomy.region_volumes(p.anatomy).values()) for p in patients]
    features = np.log(np.array(volumes))
    train = np.arange(160) < 80
    centre = [features[train & (ill == group)].mean(axis=0) for group in (False, True)]
    closer = np.linalg.norm(features - centre[1], axis=1) < np.linalg.norm(
        features - centre[0], axis=1
    )
    assert np.mean(closer[~train] == ill[~train]) >= 0.97
    assert features[ill].std(axis=0).min() > 0.05


# -- reproducibility


def test_a_patient_is_the_same_in_a_larger_cohort():
    few, many = cohort.make_patients(9, 3)[0], cohort.make_patients(9, 20)[0]
    assert few == many[:3]
    assert few != cohort.make_patients(10, 3)[0]
    first = cohort.render(few[1], 1, "bids", 32).voxels
    np.testing.assert_array_equal(first, cohort.render(many[1], 1, "bids", 32).voxels)


def test_a_second_session_shows_the_same_head_with_new_noise():
    patient = cohort.make_patient(9, 0)
    one, two = (cohort.render(patient, s, "bids", 32) for s in (1, 2))
    assert not np.array_equal(one.voxels, two.voxels)
    assert np.corrcoef(one.voxels.ravel(), two.voxels.ravel())[0, 1] > 0.93


def test_same_parameters_give_the_same_bytes(small, tmp_path):
    again = tmp_path / "again"
    phantoms.make_cohort(again, SMALL)
    names = sorted(p.relative_to(small) for p in small.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in names:
        assert (small / name).read_bytes() == (again / name).read_bytes(), name


def test_digest_ignores_order_and_notices_a_voxel():
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    hashed = cohort.array_hash(voxels)
    assert hashed == cohort.array_hash(np.asfortranarray(voxels))
    assert hashed == cohort.array_hash(voxels.astype(">i2"))
    other = cohort.array_hash(voxels + np.int16(1))
    rows = [{"a": "1"}, {"a": "2"}]
    value = cohort.digest({"x": hashed, "y": other}, rows)
    assert value == cohort.digest({"y": other, "x": hashed}, rows[::-1])
    assert value != cohort.digest({"x": other, "y": hashed}, rows)
    assert value != cohort.digest({"x": hashed, "y": other}, rows[:1])


@pytest.mark.parametrize("layout", ["bids", "dicom"])
def test_committed_sample_equals_a_regeneration(layout, tmp_path):
    committed = SAMPLE_DATA / layout
    spec = phantoms.SAMPLE[layout]
    value = phantoms.write_cohort(tmp_path, spec)
    assert value == phantoms.read_marker(committed)["digest"]
    assert value == phantoms.published_digest(spec)
    assert value == phantoms.folder_digest(committed)


def test_committed_sample_has_every_variant_and_is_small():
    patients = cohort.make_patients(phantoms.SAMPLE["bids"].seed, 12)[0]
    assert {p.bids_variant for p in patients} == {"RAS", "LAS", "permuted", "oblique"}
    assert sum(p.sessions for p in patients) >= 14
    planes = {p.dicom_plane for p in cohort.make_patients(phantoms.SAMPLE["dicom"].seed, 4)[0]}
    assert {"axial", "sagittal", "coronal"} <= planes
    files = [p for name in ("bids", "dicom") for p in (SAMPLE_DATA / name).rglob("*")]
    assert sum(p.stat().st_size for p in files if p.is_file()) < 8e6


def test_quick_start_digest_is_published():
    assert phantoms.published_digest(phantoms.QUICKSTART)


# -- making a cohort


def test_a_complete_cohort_is_left_alone(small, monkeypatch):
    monkeypatch.setattr(phantoms, "write_cohort", None)
    assert "nothing to do" in phantoms.make_cohort(small, SMALL)
    assert "verified" in phantoms.make_cohort(small, SMALL, check=True)


def test_other_parameters_and_foreign_folders_are_refused(small, tmp_path):
    with pytest.raises(phantoms.CohortError, match="--force"):
        phantoms.make_cohort(small, phantoms.Spec("bids", 5, 32, 5, 5))
    (tmp_path / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(phantoms.CohortError, match="remove it first"):
            phantoms.make_cohort(tmp_path, SMALL, force=force)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(folder, spec):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(phantoms, "write_cohort", fail)
    with pytest.raises(KeyboardInterrupt):
        phantoms.make_cohort(tmp_path / "out", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_check_notices_changed_labels_voxels_and_digests(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    spec = phantoms.Spec("bids", patients=2, grid=32, seed=5, broken=0)
    call = [str(out), "--patients=2", "--grid=32", "--seed=5", "--broken=0", "--check"]
    assert phantoms.main(call) == 0
    table = out / "participants.tsv"
    text = table.read_text()
    table.write_text(text.replace("control", "atrophy"))
    assert phantoms.main(call) == 1
    assert "--force" in capsys.readouterr().err
    table.write_text(text)
    assert phantoms.main(call) == 0
    hashes = tmp_path / "hashes.json"
    hashes.write_text(json.dumps({"cohorts": {spec.key(): "0" * 64}}))
    monkeypatch.setattr(phantoms, "HASHES", hashes)
    assert phantoms.main(call) == 1
    assert "numpy" in capsys.readouterr().err
    scan = next(out.glob("sub-*/ses-01/anat/*.nii.gz"))
    scan.write_bytes(scan.read_bytes()[:-900])
    assert phantoms.main(call) == 1
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.undo()
    assert phantoms.main([*call, "--force"]) == 0


def test_command_line_refuses_nonsense(capsys):
    for call in ([], ["x", "--sample"], ["x", "--grid=20"], ["x", "--patients=0"]):
        with pytest.raises(SystemExit):
            phantoms.main(call)
    capsys.readouterr()


# -- broken files


def test_broken_nifti_files_are_really_broken(small):
    broken = phantoms.read_marker(small)["broken_files"]
    assert sorted(broken.values()) == sorted(nifti_files.BROKEN_KINDS)
    for name, kind in broken.items():
        try:
            image = nib.load(small / name)
            voxels = np.asarray(image.dataobj)
        except (EOFError, OSError, zlib.error, ImageFileError, HeaderDataError):
            assert kind in ("truncated", "text", "bad_header")
            continue
        if kind == "four_d":
            assert voxels.ndim == 4
        else:
            assert kind == "nan_affine" and np.isnan(image.affine).any()
    good = [p for p in small.glob("sub-*/ses-*/anat/*_T1w.nii.gz")]
    assert len(good) - len(broken) == sum(p.sessions for p in cohort.make_patients(5, 4)[0])


def test_broken_dicom_series_are_really_broken(tmp_path):
    spec = phantoms.Spec("dicom", patients=1, grid=32, seed=5, broken=3)
    phantoms.make_cohort(tmp_path / "out", spec, check=True)
    broken = phantoms.read_marker(tmp_path / "out")["broken_files"]
    kinds = {kind: tmp_path / "out" / name for name, kind in broken.items()}
    assert sorted(kinds) == sorted(dicom_files.BROKEN_KINDS)
    assert len(list(kinds["missing_slice"].iterdir())) == 31
    found = [dicom_files.pydicom.dcmread(p) for p in kinds["two_patients"].iterdir()]
    assert len({ds.PatientID for ds in found}) == 2
    assert len({ds.SeriesInstanceUID for ds in found}) == 1
    with pytest.raises(dicom_files.pydicom.errors.InvalidDicomError):
        dicom_files.read_series(kinds["not_dicom"])


# -- planted identities


def source_bytes(folder, pattern):
    """Bytes of the matching files, their names, and what NIfTI files hold compressed."""
    content = b""
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            data = path.read_bytes()
            content += path.name.encode() + data
            if path.name.endswith(".nii.gz"):
                content += gzip.decompress(data)
    return content


def test_planted_strings_are_in_the_committed_files():
    key = json.loads((SAMPLE_DATA / "identities.json").read_text())
    assert key == {name: phantoms.identities(spec) for name, spec in phantoms.SAMPLE.items()}
    broken = phantoms.read_marker(SAMPLE_DATA / "bids")["broken_files"]
    for sub, strings in key["bids"].items():
        assert min(map(len, strings)) >= 6
        if any(name.startswith(sub) for name in broken):
            continue
        images = source_bytes(SAMPLE_DATA / "bids" / sub, "*.nii.gz")
        everything = source_bytes(SAMPLE_DATA / "bids" / sub, "*")
        for text in strings:
            assert text.encode() in everything, text
        assert strings and sum(text.encode() in images for text in strings) >= 7
    everything = source_bytes(SAMPLE_DATA / "dicom", "*")
    for strings in key["dicom"].values():
        assert min(map(len, strings)) >= 6
        for text in strings:
            assert text.encode() in everything, text


def test_identities_of_the_quick_start_are_distinct():
    good, extra = cohort.make_patients(7, 260, 5)
    people = [*good, *extra]
    assert len({p.participant_id for p in people}) == 265
    assert len({p.identity.patient_id for p in people}) == 265
    assert len({p.identity.number for p in people}) == 265
